"""State tracking by linear recurrences whose eigenvalues may be negative (Grazzi et al. 2024)."""

from __future__ import annotations

import statistics
from typing import Any

from seqmix.claims._claim import Claim, Finding, Run, Verdict, compare_groups
from seqmix.claims._training import accuracy_after_training, at_growing_lengths
from seqmix.tasks import TASKS

SOLVED = 0.95
AT_CHANCE = 0.60


def layout(run: Run, mixer: str, *, negative: bool) -> str:
    options = dict(run["mixers"][mixer]) | {"negative_eigenvalues": str(negative).lower()}
    return f"{mixer}({', '.join(f'{name}={value}' for name, value in options.items())})"


def accuracies(run: Run, task_name: str, mixer: str) -> dict[str, dict[str, list[float]]]:
    """With the switch `on` and `off`: accuracies at each test length, on positions that no training example
    reaches, one per seed."""
    settings = run[task_name]
    task = TASKS.get(task_name)
    learned = task(task.Config(**settings["task"]))
    seen = learned.config.length
    if "growing" in settings:
        learned = at_growing_lengths(learned, learned.shortest, settings["growing"])
    tests = {"training length": {"length": seen, "first": 0}} | {
        f"length {length}": {"length": length, "first": seen} for length in settings["lengths"]
    }
    return {
        switch: _by_test(
            [
                accuracy_after_training(
                    run,
                    layout(run, mixer, negative=switch == "on"),
                    learned,
                    settings["training"],
                    seed=seed,
                    name=f"{task_name}, {mixer}, {switch}",
                    tests=tests,
                )
                for seed in range(run["seeds"])
            ]
        )
        for switch in ("on", "off")
    }


def _by_test(seeds: list[dict[str, float]]) -> dict[str, list[float]]:
    return {test: [seed[test] for seed in seeds] for test in seeds[0]}


def parity(run: Run, mixer: str) -> Finding:
    found = accuracies(run, "parity", mixer)
    longest = f"length {max(run['parity']['lengths'])}"
    on, off = (statistics.fmean(found[switch][longest]) for switch in ("on", "off"))
    verdict: Verdict = "inconclusive"
    if on >= SOLVED and off <= AT_CHANCE:
        verdict = "reproduced"
    elif on <= max(off, AT_CHANCE):
        verdict = "not reproduced"
    return Finding(
        f"{mixer}: parity is solved at lengths beyond training with eigenvalues in [-1, 1], and is at chance "
        "with eigenvalues in [0, 1].",
        f"at the longest test length, on positions beyond training: mean accuracy over seeds at least "
        f"{SOLVED} with the switch on and at most {AT_CHANCE} with it off (chance is 0.5)",
        found,
        verdict,
    )


def modular_arithmetic(run: Run, mixer: str) -> Finding:
    found: dict[str, Any] = accuracies(run, "modular_arithmetic", mixer)
    longest = f"length {max(run['modular_arithmetic']['lengths'])}"
    return Finding(
        f"{mixer}: modular arithmetic improves with eigenvalues in [-1, 1].",
        "at the longest test length, on positions beyond training: accuracy with the switch on above that "
        "with it off, beyond two standard errors over seeds",
        found,
        compare_groups(found["on"][longest], found["off"][longest]),
    )


def measure(run: Run) -> list[Finding]:
    return [parity(run, mixer) for mixer in run["mixers"]] + [
        modular_arithmetic(run, mixer) for mixer in run["mixers"]
    ]


MODEL = {"width": 32, "heads": 4, "tied": False, "weight_decay": 0.01}
MIXER_OPTIONS = {"delta_net": {"convolution_size": 1}, "mamba": {"state_width": 8}}

SMALL = MODEL | {"width": 8, "depth": 1, "batch": 8, "steps": 20, "learning_rate": 1e-2}

CLAIM = Claim(
    title="Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues",
    paper="arXiv:2411.12537",
    claimed="Linear recurrences whose transitions have eigenvalues in [0, 1] only cannot track parity at all "
    "lengths. Eigenvalues in [-1, 1] let DeltaNet and Mamba learn it on short sequences and keep it on longer "
    "ones, and improve modular arithmetic.",
    where="theorems 1 and 2; the formal-language experiments of section 5.1 (training lengths up to 40, test "
    "lengths 40 to 256)",
    measure=measure,
    quick={
        "mixers": MIXER_OPTIONS,
        "seeds": 1,
        "parity": {
            "task": {"length": 8},
            "lengths": [16],
            "training": SMALL,
        },
        "modular_arithmetic": {
            "task": {"length": 9},
            "lengths": [17],
            "growing": 10,
            "training": SMALL,
        },
    },
    full={
        "mixers": MIXER_OPTIONS,
        "seeds": 2,
        "parity": {
            "task": {"length": 40},
            "lengths": [64, 128, 256],
            "training": MODEL | {"depth": 1, "batch": 32, "steps": 600, "learning_rate": 1e-2},
        },
        "modular_arithmetic": {
            "task": {"length": 16, "modulus": 3, "operators": "+-"},
            "lengths": [24],
            "growing": 300,
            "training": MODEL | {"depth": 2, "batch": 64, "steps": 600, "learning_rate": 1e-2},
        },
    },
)
