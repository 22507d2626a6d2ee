"""Mamba: selection where a fixed state space fails, and decoding whose cost does not grow (Gu & Dao 2023)."""

from __future__ import annotations

import math
import statistics
import time
from itertools import pairwise
from typing import Any

import torch

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._training import accuracy_after_training, best_learning_rate
from seqmix.core.state import fork
from seqmix.models.backbone import LanguageModel, ModelSpec, count_parameters
from seqmix.tasks import TASKS

SOLVED = 0.9
FAILED = 0.6
PIECE = 2048  # tokens read at once while a state is built
SAME_SIZE = 0.05  # relative difference of parameter counts
LEAST_GROWTH = 1.5  # of the speed ratio, from the shortest to the longest context


def solves(run: Run, task_name: str) -> Finding:
    """Accuracy on the training length per model and seed, each at its best learning rate."""
    settings = run[task_name]
    task = TASKS.get(task_name)
    learned = task(task.Config(**settings["task"]))
    found: dict[str, list[float]] = {}
    for name, layout in run["layouts"].items():
        label = f"{task_name}, {name}"
        rate = best_learning_rate(
            run,
            layout,
            learned,
            settings["training"],
            rates=run["rates"],
            seed=run["seeds"],
            name=label,
        )
        tuned = dict(settings["training"]) | {"learning_rate": rate}
        found[name] = [
            accuracy_after_training(run, layout, learned, tuned, seed=seed, name=label)[
                "training length"
            ]
            for seed in range(run["seeds"])
        ]
    mean = {name: statistics.fmean(values) for name, values in found.items()}
    if mean["mamba"] >= SOLVED and mean["s4d"] <= FAILED:
        verdict = "reproduced"
    elif mean["mamba"] >= SOLVED and mean["s4d"] < SOLVED:
        verdict = "inconclusive"
    else:
        verdict = "not reproduced"
    return Finding(
        f"Mamba solves {task_name.replace('_', ' ')} where the non-selective S4 (here S4D) fails.",
        f"mean accuracy over seeds at least {SOLVED} for Mamba and at most {FAILED} for S4D, with equal "
        f"steps, data and learning rates tried ({', '.join(map(str, run['rates']))}), and parameters within "
        f"{SAME_SIZE:.0%} of each other",
        {
            "accuracy": found,
            "chance": learned.chance(),
            "parameters": _parameters(settings["training"], run["layouts"], learned.vocabulary),
            "task": settings["task"],
        },
        verdict,  # type: ignore[arg-type]
    )


def _parameters(
    settings: dict[str, Any], layouts: dict[str, str], vocabulary: int
) -> dict[str, int]:
    shared = {k: v for k, v in settings.items() if k in ModelSpec.fields()}
    return {
        name: count_parameters(ModelSpec(layout=layout, vocabulary=vocabulary, **shared))
        for name, layout in layouts.items()
    }


@torch.no_grad()
def decoding_milliseconds(run: Run) -> dict[str, dict[str, float]]:
    """Median time of one decoding step of a batch, by context and model; steps of the models alternate.

    The weights and the text are random: neither changes what a step costs. One text is read and its state
    repeated for the batch.
    """
    generator = torch.Generator().manual_seed(0)
    batch, vocabulary = run["decoding"]["batch"], 256
    models, states = {}, {}
    for name, layout in run["decoding"]["layouts"].items():
        torch.manual_seed(0)
        spec = ModelSpec(layout=layout, vocabulary=vocabulary, **run["decoding"]["model"])
        models[name] = LanguageModel(spec).eval()
        states[name] = models[name].initial_state(1)
    medians: dict[str, dict[str, float]] = {}
    read = 0
    for context in run["decoding"]["contexts"]:
        while read < context:
            piece = min(PIECE, context - read)
            ids = torch.randint(vocabulary, (1, piece), generator=generator)
            for name, model in models.items():
                states[name] = model.backbone(model.embedding(ids), states[name])[1]
            read += piece
        samples: dict[str, list[float]] = {name: [] for name in models}
        wide = {name: fork(state, batch) for name, state in states.items()}
        token = torch.randint(vocabulary, (batch, 1), generator=generator)
        for turn in range(run["decoding"]["repeats"] + 2):
            for name, model in models.items():
                start = time.perf_counter()
                _, wide[name] = model(token, wide[name])
                if turn >= 2:  # the first grow the cache's spare room
                    samples[name].append(1000 * (time.perf_counter() - start))
        medians[str(context)] = {name: statistics.median(s) for name, s in samples.items()}
    return medians


def decoding_ratio_grows(run: Run) -> Finding:
    decoding = run["decoding"]
    medians = run.remember("decoding", lambda: decoding_milliseconds(run))
    ratios = {context: times["transformer"] / times["mamba"] for context, times in medians.items()}
    parameters = _parameters(decoding["model"], decoding["layouts"], 256)
    difference = abs(parameters["mamba"] / parameters["transformer"] - 1)
    values = list(ratios.values())
    rising = all(after > before for before, after in pairwise(values))
    grown = values[-1] / values[0]
    if difference > SAME_SIZE or not all(math.isfinite(value) for value in values):
        verdict = "inconclusive"
    elif rising and grown >= LEAST_GROWTH and values[-1] > 1:
        verdict = "reproduced"
    else:
        verdict = "not reproduced"
    return Finding(
        "Mamba's decoding throughput against a Transformer of the same size with a key-value cache grows "
        "with the context.",
        f"the ratio of throughputs rises at each longer context, by {LEAST_GROWTH} in all or more, to more "
        f"than 1; parameters within {SAME_SIZE:.0%} of each other",
        {
            "throughput of Mamba over the Transformer": ratios,
            "milliseconds per step": medians,
            "batch": decoding["batch"],
            "parameters": parameters,
        },
        verdict,  # type: ignore[arg-type]
    )


def measure(run: Run) -> list[Finding]:
    return [
        solves(run, "selective_copying"),
        solves(run, "induction_heads"),
        decoding_ratio_grows(run),
    ]


MODEL = {
    "width": 32,
    "depth": 2,
    "channel": "none",
    "tied": False,
    "batch": 32,
    "weight_decay": 0.01,
}
SIZES = {"mamba": "mamba", "s4d": "s4d(state_width=118)"}
DECODING = {
    "layouts": {"mamba": "4x[mamba/none]", "transformer": "2x[attention/glu(expansion=3.125)]"},
    "repeats": 20,
    "batch": 8,
}

CLAIM = Claim(
    title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    paper="arXiv:2312.00752",
    claimed="Parameters of a state space that depend on the token let it copy selectively and form induction "
    "heads, where one that is the same at every token fails. Decoding needs no key-value cache, so its "
    "throughput is up to five times that of a Transformer of the same size.",
    where="sections 4.1 (tables 1 and 2) and 4.5 (figure 8, right)",
    measure=measure,
    quick={
        "layouts": SIZES,
        "seeds": 1,
        "rates": [5e-3],
        "selective_copying": {
            "task": {"length": 12, "items": 2, "vocabulary": 6},
            "training": MODEL | {"width": 8, "batch": 4, "steps": 4},
        },
        "induction_heads": {
            "task": {"length": 12, "vocabulary": 6},
            "training": MODEL | {"width": 8, "batch": 4, "steps": 4},
        },
        "decoding": DECODING
        | {"model": {"width": 32, "heads": 2}, "contexts": [64, 256], "repeats": 3},
    },
    full={
        "layouts": SIZES,
        "seeds": 2,
        "rates": [5e-3],
        "selective_copying": {
            "task": {"length": 32, "items": 4, "vocabulary": 8},
            "training": MODEL | {"steps": 600},
        },
        "induction_heads": {
            "task": {"length": 32, "vocabulary": 8},
            "training": MODEL | {"channel": "glu", "steps": 400},
        },
        "decoding": DECODING
        | {"model": {"width": 256, "heads": 4}, "contexts": [1024, 4096, 16384]},
    },
)
