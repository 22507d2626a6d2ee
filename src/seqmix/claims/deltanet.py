"""DeltaNet: the delta rule trained chunk by chunk, its recall, and hybrids with attention (Yang et al. 2024)."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._claim import Claim, Finding, Run, Verdict, compare_groups
from seqmix.claims._training import accuracy_after_training, best_learning_rate, specify
from seqmix.models.backbone import Backbone
from seqmix.ops.delta_rule import OPERATOR, delta_rule
from seqmix.tasks import TASKS

# Relative errors: both forms lose digits, in different places.
ALLOWED = {"float64": 1e-10, "float32": 1e-4}
FORMS = ("chunked", "definition")


def relative_errors(length: int, dtype: torch.dtype) -> dict[str, float]:
    """|chunked - token loop| / |token loop| of outputs, last state and the gradient of every input."""
    generator = torch.Generator().manual_seed(length)
    case = OPERATOR.cases[0].at(T=length, B=1, K=32, V=32)
    inputs = OPERATOR.sample(case, generator)
    weights = [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in (inputs["v"].shape, inputs["initial_state"].shape)
    ]

    def results(form: str) -> dict[str, Tensor]:
        given = {
            name: x.to(dtype, copy=True).requires_grad_() if isinstance(x, Tensor) else x
            for name, x in inputs.items()
        }
        o, state = delta_rule(**given, output_final_state=True, form=form)
        assert state is not None
        sum((x * w).sum() for x, w in zip((o, state), weights, strict=True)).backward()
        gradients = {
            f"gradient of {name}": x.grad for name, x in given.items() if isinstance(x, Tensor)
        }
        return {"output": o.detach(), "state": state.detach()} | gradients

    got, wanted = (results(form) for form in FORMS)
    return {name: ((got[name] - x).norm() / x.norm()).item() for name, x in wanted.items()}


def chunked_equals_loop(run: Run) -> Finding:
    worst: dict[str, Any] = {}
    for name in ALLOWED:
        dtype = getattr(torch, name)
        found = [
            run.remember(f"{name}, length {n}", lambda n=n, d=dtype: relative_errors(n, d))
            for n in run["lengths"]
        ]
        worst[name] = {part: max(errors[part] for errors in found) for part in found[0]}
    holds = all(max(worst[name].values()) < allowed for name, allowed in ALLOWED.items())
    limits = ", ".join(f"{allowed:g} in {name}" for name, allowed in ALLOWED.items())
    return Finding(
        "The chunked form equals the loop over tokens: outputs, last state and gradients.",
        f"largest relative error at lengths {run['lengths']} below {limits}",
        worst,
        "reproduced" if holds else "not reproduced",
    )


def recurrent_bytes(run: Run, layout: str) -> int:
    """Bytes of recurrent state per text, all blocks: without the histories of short convolutions."""
    spec, _ = specify(layout, run["training"]["recall"])
    states = Backbone(spec).initial_state(1, torch.empty(0))
    return sum(4 * state["recurrent"].numel() for state in states if "recurrent" in state)


def recall(run: Run, name: str, layout: str, load: str) -> list[float]:
    """Accuracy of associative recall per seed, at the best learning rate of a seed kept for choosing."""
    task = TASKS.get("associative_recall")
    learned = task(task.Config(**run[load]))
    label, training = f"{load}, {name}", run["training"][load]
    rate = best_learning_rate(
        run,
        layout,
        learned,
        training,
        rates=run["rates"][load],
        seed=run["seeds"],
        name=label,
    )
    settings = dict(training) | {"learning_rate": rate}
    return [
        accuracy_after_training(run, layout, learned, settings, seed=seed, name=label)[
            "training length"
        ]
        for seed in range(run["seeds"])
    ]


def strongest(verdicts: list[Verdict]) -> Verdict:
    """All or nothing: reproduced if every comparison is, not reproduced if one is not."""
    if all(verdict == "reproduced" for verdict in verdicts):
        return "reproduced"
    return "not reproduced" if "not reproduced" in verdicts else "inconclusive"


def above_others(run: Run) -> Finding:
    found = {
        name: recall(run, name, layout, "recall") for name, layout in run["equal state"].items()
    }
    state = {name: recurrent_bytes(run, layout) for name, layout in run["equal state"].items()}
    others = [name for name in found if name != "delta_net"]
    verdicts = [compare_groups(found["delta_net"], found[name]) for name in others]
    if len(set(state.values())) > 1:
        verdicts = ["inconclusive"]  # not the comparison that was meant
    return Finding(
        "DeltaNet recalls more than gated linear attention and Mamba with states of equal size.",
        "accuracy above that of each other model, beyond two standard errors over seeds, with equal bytes of "
        "recurrent state",
        {"accuracy": found, "recurrent state bytes": state, "task": run["recall"]},
        strongest(verdicts),
    )


def hybrid_wins(run: Run, name: str) -> Finding:
    found = {
        label: recall(run, label, run["hybrids"][label], "hard recall") for label in ("pure", name)
    }
    return Finding(
        f"A hybrid ({name}) recalls more than DeltaNet alone.",
        "accuracy above that of the pure model of the same depth, beyond two standard errors over seeds",
        {
            "accuracy": found,
            "mean": {label: statistics.fmean(values) for label, values in found.items()},
            "layouts": {label: run["hybrids"][label] for label in found},
            "task": run["hard recall"],
        },
        compare_groups(found[name], found["pure"]),
    )


def measure(run: Run) -> list[Finding]:
    hybrids = [hybrid_wins(run, name) for name in run["hybrids"] if name != "pure"]
    return [chunked_equals_loop(run), above_others(run), *hybrids]


TRAINING = {"width": 32, "heads": 2, "batch": 32, "weight_decay": 0.01}
QUICK = TRAINING | {"batch": 4, "steps": 4}
EQUAL_STATE = {
    "delta_net": "2x[delta_net]",
    "gated_linear_attention": "short_convolution/none, 2x[gated_linear_attention(key_ratio=1.0)]",
    "mamba2": "2x[mamba2(expansion=1.0, state_width=16)]",
}
HYBRIDS = {
    "pure": "4x[delta_net]",
    "sliding-window attention every other layer": "2x[delta_net, windowed_attention(window=24)]",
    "two global attention layers": "delta_net, 2x[attention], delta_net",
}

CLAIM = Claim(
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    paper="arXiv:2406.06484",
    claimed="The delta rule can be computed chunk by chunk with the result of the token loop. DeltaNet recalls "
    "associations better than gated linear attention and Mamba, and hybrids with sliding-window attention "
    "every other layer or with two global attention layers recall better still.",
    where="sections 3.2 (chunked form), 4.1 (figure 2, associative recall) and 4.2 (table 2, hybrids)",
    measure=measure,
    quick={
        "lengths": [1, 63, 130],
        "equal state": EQUAL_STATE,
        "hybrids": HYBRIDS,
        "recall": {"length": 16, "pairs": 2, "vocabulary": 16},
        "hard recall": {"length": 16, "pairs": 4, "vocabulary": 16},
        "training": {"recall": QUICK, "hard recall": QUICK},
        "rates": {"recall": [1e-2], "hard recall": [1e-2]},
        "seeds": 1,
    },
    full={
        "lengths": [1, 63, 64, 65, 100, 513],
        "equal state": EQUAL_STATE,
        "hybrids": HYBRIDS,
        "recall": {"length": 32, "pairs": 8, "vocabulary": 32},
        "hard recall": {"length": 48, "pairs": 12, "vocabulary": 32},
        "training": {
            "recall": TRAINING | {"steps": 300},
            "hard recall": TRAINING | {"steps": 600},
        },
        "rates": {"recall": [1e-2], "hard recall": [1e-2]},
        "seeds": 2,
    },
)
