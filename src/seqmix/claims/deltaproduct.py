"""Householder products: state tracking rises with the steps per token (Siems et al. 2025)."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

from seqmix.claims._claim import Claim, Finding, Run, Verdict, compare_groups
from seqmix.claims._training import accuracy_after_training, at_growing_lengths
from seqmix.tasks import TASKS

SHORTEST = 3  # training examples
LEARNED = (
    3  # times chance: below it no model has learned the task, and the steps make no difference
)
SOLVED = 0.95  # from here on there is little left to rise


def layout(steps: int) -> str:
    options = "negative_eigenvalues=true, forget=false, convolution_size=1"
    return f"delta_product(steps={steps}, {options})"


def accuracies(run: Run, group: str) -> dict[str, dict[int, list[float]]]:
    """By test and steps per token: accuracies on the word problem of `group`, one per seed."""
    settings = run["groups"][group]
    task, length = TASKS.get("permutation_composition"), settings["length"]
    learned = at_growing_lengths(
        task(task.Config(group=group, length=length)), SHORTEST, settings["growing"]
    )
    tests = {f"positions 2 to {length}": {"length": length, "first": 1}} | {
        f"positions {length + 1} to {longer}": {"length": longer, "first": length}
        for longer in settings["longer"]
    }
    found = {
        steps: [
            accuracy_after_training(
                run,
                layout(steps),
                learned,
                settings["training"],
                seed=seed,
                name=f"{group}, {steps} steps",
                tests=tests,
            )
            for seed in range(run["seeds"])
        ]
        for steps in run["steps"]
    }
    return {
        test: {steps: [seed[test] for seed in seeds] for steps, seeds in found.items()}
        for test in tests
    }


def rises(by_steps: dict[int, list[float]], chance: float) -> Verdict:
    """Whether each number of steps beats the one before, where that one leaves room to rise."""
    counts = list(by_steps)
    if max(statistics.fmean(values) for values in by_steps.values()) < LEARNED * chance:
        return "inconclusive"
    verdicts = []
    for fewer, more in pairwise(counts):
        solved = min(statistics.fmean(by_steps[n]) for n in (fewer, more)) >= SOLVED
        verdicts.append("reproduced" if solved else compare_groups(by_steps[more], by_steps[fewer]))
    if all(verdict == "reproduced" for verdict in verdicts):
        return "reproduced"
    return "not reproduced" if "not reproduced" in verdicts else "inconclusive"


def measure(run: Run) -> list[Finding]:
    findings = []
    for group in run["groups"]:
        chance = 1 / math.factorial(int(group[1:]))
        for test, by_steps in accuracies(run, group).items():
            findings.append(
                Finding(
                    f"{group.upper()}: the accuracy of the word problem rises with the Householder steps "
                    f"per token ({test}).",
                    f"with {', '.join(map(str, run['steps']))} steps, each number beats the one before, "
                    f"beyond two standard errors over seeds, or both reach {SOLVED}; inconclusive if none "
                    f"reaches {LEARNED} times chance ({chance:.3g})",
                    {
                        "accuracy": by_steps,
                        "mean": {n: statistics.fmean(values) for n, values in by_steps.items()},
                    },
                    rises(by_steps, chance),
                )
            )
    return findings


MODEL = {
    "width": 32,
    "heads": 4,
    "channel": "none",
    "tied": False,
    "batch": 64,
    "weight_decay": 0.01,
}

CLAIM = Claim(
    title="DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
    paper="arXiv:2502.10297",
    claimed="A transition that is a product of several Householder matrices tracks more states: the accuracy of "
    "permutation word problems, and its extrapolation to longer sequences, rise with the number of "
    "Householder steps per token.",
    where="section 5.1 (figures on S3, S4, A5 and S5, one layer)",
    measure=measure,
    quick={
        "steps": [1, 2],
        "seeds": 1,
        "groups": {
            "s3": {
                "length": 6,
                "longer": [12],
                "growing": 10,
                "training": MODEL | {"width": 8, "batch": 8, "steps": 15, "learning_rate": 1e-2},
            },
        },
    },
    full={
        "steps": [1, 2, 3],
        "seeds": 2,
        "groups": {
            "s3": {
                "length": 16,
                "longer": [32, 64],
                "growing": 700,
                "training": MODEL | {"steps": 1000, "learning_rate": 1e-2},
            },
            "s5": {
                "length": 8,
                "longer": [16],
                "growing": 280,
                "training": MODEL | {"width": 64, "steps": 400, "learning_rate": 4e-3},
            },
        },
    },
)
