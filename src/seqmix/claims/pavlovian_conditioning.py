"""Attention as a Hebbian memory of limited capacity, and learning rules that hold more."""

from __future__ import annotations

import math
import statistics
from typing import Any

from seqmix.analyze.memory_capacity import LEARNING_RULES, capacity, retrieval_error
from seqmix.claims._claim import Claim, Finding, Run, compare_groups

LEVEL = 0.5  # retrieval error up to which a pair counts as stored


def measure(run: Run) -> list[Finding]:
    return [error_follows_theory(run), capacity_is_linear(run), delta_rule_holds_more(run)]


def error_follows_theory(run: Run) -> Finding:
    """The squared error of a Hebbian memory of random unit keys is (n - 1) / d."""

    def errors(width: int) -> dict[str, list[float]]:
        counts = [max(2, round(width * load)) for load in run["loads"]]
        measured = [
            retrieval_error(
                LEARNING_RULES["hebbian"], pairs=n, key_width=width, trials=run["trials"]
            )
            for n in counts
        ]
        return {"measured": measured, "predicted": [(n - 1) / width for n in counts]}

    table = {
        str(width): run.remember(f"Hebbian error, key width {width}", lambda w=width: errors(w))
        for width in run["widths"]
    }
    worst = max(
        abs(measured / predicted - 1)
        for row in table.values()
        for measured, predicted in zip(row["measured"], row["predicted"], strict=True)
    )
    return Finding(
        "The retrieval error of linear attention (a Hebbian memory) follows (pairs - 1) / key width.",
        "largest relative deviation from the formula below 0.15",
        {"largest deviation": worst, "loads": run["loads"], "errors by key width": table},
        "reproduced" if worst < 0.15 else "not reproduced",
    )


def capacities(run: Run, rule: str) -> dict[int, list[int]]:
    """Pairs held at an error of LEVEL, by key width, one per seed."""
    return {
        width: [
            run.remember(
                f"capacity of {rule}, key width {width}, seed {seed}",
                lambda w=width, s=seed: capacity(
                    LEARNING_RULES[rule], key_width=w, error=LEVEL, trials=run["trials"], seed=s
                ),
            )
            for seed in range(run["seeds"])
        ]
        for width in run["widths"]
    }


def slope(values: dict[int, list[int]]) -> float:
    """Exponent of a power law through the means, by least squares in log-log."""
    x = [math.log(width) for width in values]
    y = [math.log(statistics.fmean(counts)) for counts in values.values()]
    return statistics.linear_regression(x, y).slope


def capacity_is_linear(run: Run) -> Finding:
    measured = capacities(run, "hebbian")
    exponent = slope(measured)
    return Finding(
        "A head stores O(d_k) associations before interference degrades retrieval.",
        f"pairs held at an error of {LEVEL} grow as key width to a power between 0.9 and 1.1",
        {"exponent": exponent, "pairs held by key width": measured},
        "reproduced" if 0.9 <= exponent <= 1.1 else "not reproduced",
    )


def delta_rule_holds_more(run: Run) -> Finding:
    rules = {rule: capacities(run, rule) for rule in ("hebbian", "fading", "error_correcting")}
    verdicts = [
        compare_groups(rules["error_correcting"][width], rules["hebbian"][width])
        for width in run["widths"]
    ]
    measured: dict[str, Any] = {
        f"pairs held, {rule}": {width: statistics.fmean(n) for width, n in by_width.items()}
        for rule, by_width in rules.items()
    }
    if all(verdict == "reproduced" for verdict in verdicts):
        verdict = "reproduced"
    else:
        verdict = "not reproduced" if "not reproduced" in verdicts else "inconclusive"
    return Finding(
        "An error-correcting rule (the delta rule) holds more pairs than the Hebbian rule.",
        f"more pairs at an error of {LEVEL}, at every key width, beyond two standard errors over seeds",
        measured,
        verdict,
    )


CLAIM = Claim(
    title="Understanding Transformers through the Lens of Pavlovian Conditioning",
    paper="arXiv:2508.08289",
    claimed="Linear attention is a Hebbian associative memory: an attention head stores a number of "
    "associations proportional to its key width before interference spoils retrieval, and biologically "
    "motivated learning rules improve on the Hebbian one.",
    where="the capacity theorem as in version 2 (version 1 states the square root of the key width, for "
    "retrieval without error), and the section on other learning rules",
    measure=measure,
    quick={"widths": [8, 16], "loads": [0.5, 1.0], "trials": 64, "seeds": 2},
    full={"widths": [16, 32, 64, 96], "loads": [0.25, 0.5, 1.0, 2.0], "trials": 32, "seeds": 3},
)
