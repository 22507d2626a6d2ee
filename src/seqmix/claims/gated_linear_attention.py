"""Gated linear attention: forms that agree, linear cost, and the quality of a softmax Transformer."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._training import QUICK_TEXT, loss_after_training, specify
from seqmix.core.numerics import relative_error
from seqmix.models.backbone import count_parameters
from seqmix.ops import OPERATORS, Case
from seqmix.ops.attention import attention
from seqmix.ops.linear_attention import linear_attention

HEADS, KEY_WIDTH, VALUE_WIDTH = 4, 32, 64  # of one layer of width 256, keys of half the width


def measure(run: Run) -> list[Finding]:
    return [forms_agree(run), *speed(run), quality(run)]


def forms_agree(run: Run) -> Finding:
    """Chunked and parallel against the token loop in float64, for mild and for strong decays."""
    operator = OPERATORS.get("linear_attention")

    def errors() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, bias in (("mild", 3.0), ("strong", -6.0)):
            sizes = {"B": 1, "T": run["agreement_length"], "H": 2, "K": 16, "V": 24}
            case = Case(name, sizes, {"gate": "vector", "bias": bias})
            inputs = operator.sample(case, torch.Generator().manual_seed(0))
            exact_inputs = {name: tensor.double() for name, tensor in inputs.items()}
            exact = linear_attention(**exact_inputs, form="definition")[0]
            loop = linear_attention(**inputs, form="definition")[0]
            found[f"{name}, token loop, float32"] = relative_error(loop, exact)
            for form in ("chunked", "parallel"):
                o = linear_attention(**exact_inputs, form=form)[0]
                found[f"{name}, {form}, float64"] = relative_error(o, exact)
                o = linear_attention(**inputs, form=form)[0]
                found[f"{name}, {form}, float32"] = relative_error(o, exact)
        return found

    found = run.remember("errors of the forms", errors)
    agree = all(error < (1e-12 if "float64" in name else 1e-5) for name, error in found.items())
    return Finding(
        "The recurrent, chunked and parallel forms compute the same function, under strong decays too.",
        "relative errors below 1e-12 in float64 and 1e-5 in float32",
        found,
        "reproduced" if agree else "not reproduced",
    )


def times(run: Run) -> dict[str, dict[str, float]]:
    """Median milliseconds of forward and backward of one layer, the two operators in turn."""

    def layer(name: str, length: int) -> Any:
        generator = torch.Generator().manual_seed(length)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(1, length, HEADS, *shape, generator=generator).requires_grad_()

        if name == "softmax":
            q, k, v = normal(VALUE_WIDTH), normal(VALUE_WIDTH), normal(VALUE_WIDTH)
            return lambda: attention(q, k, v).sum().backward()
        q, k, v, x = normal(KEY_WIDTH), normal(KEY_WIDTH), normal(VALUE_WIDTH), normal(KEY_WIDTH)
        return lambda: (
            linear_attention(q, k, v, torch.nn.functional.logsigmoid(x) / 16)[0].sum().backward()
        )

    def milliseconds(length: int) -> dict[str, float]:
        calls = {name: layer(name, length) for name in ("gated linear", "softmax")}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(run["repeats"] + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if repeat:  # the first call warms up
                    samples[name].append((time.perf_counter() - start) * 1e3)
        return {name: statistics.median(values) for name, values in samples.items()}

    return {
        str(length): run.remember(
            f"milliseconds at length {length}", lambda t=length: milliseconds(t)
        )
        for length in run["lengths"]
    }


def speed(run: Run) -> list[Finding]:
    table = times(run)
    lengths = [int(length) for length in table]
    exponents = {
        name: statistics.linear_regression(
            [math.log(length) for length in lengths],
            [math.log(table[str(length)][name]) for length in lengths],
        ).slope
        for name in ("gated linear", "softmax")
    }
    faster = [t for t in lengths if table[str(t)]["gated linear"] < table[str(t)]["softmax"]]
    # The crossover is where it is faster there and at every longer length measured.
    stable = [t for t in lengths if all(other in faster for other in lengths if other >= t)]
    return [
        Finding(
            "The cost of the chunked form grows linearly with the length.",
            "forward and backward take time proportional to length to a power below 1.2",
            {"exponents": exponents, "median milliseconds by length": table},
            "reproduced" if exponents["gated linear"] < 1.2 else "not reproduced",
        ),
        Finding(
            "Beyond some length it trains faster than softmax attention (the paper: FlashAttention-2, 4k, GPU).",
            "faster forward and backward, at equal width, at the longest length measured",
            {
                "crossover length": stable[0] if stable else None,
                "speed-up by length": {
                    t: row["softmax"] / row["gated linear"] for t, row in table.items()
                },
            },
            "reproduced" if stable else "not reproduced",
        ),
    ]


def quality(run: Run) -> Finding:
    layouts = ("attention", "gated_linear_attention")
    losses = {
        layout: [
            loss_after_training(run, layout, run["data"], run["training"], seed=seed)
            for seed in range(run["seeds"])
        ]
        for layout in layouts
    }
    ratio = statistics.fmean(losses["gated_linear_attention"]) / statistics.fmean(
        losses["attention"]
    )
    sizes = {layout: count_parameters(specify(layout, run["training"])[0]) for layout in layouts}
    return Finding(
        "It trains to within a few per cent of a softmax Transformer of the same size on real text.",
        "held-out loss at most 1.05 times that of softmax attention, same width, depth and tokens",
        {"loss ratio": ratio, "nats per byte": losses, "parameters": sizes},
        "reproduced" if ratio <= 1.05 else "not reproduced",
    )


CLAIM = Claim(
    title="Gated Linear Attention Transformers with Hardware-Efficient Training",
    paper="arXiv:2312.06635",
    claimed="Linear attention with a data-dependent decay per key dimension can be trained in chunks at a cost "
    "linear in the length, faster than softmax attention on long sequences, and competes with a softmax "
    "Transformer of the same size in language modelling.",
    where="sections 3 and 4; Figure 4 (speed); Table 2 (language modelling)",
    measure=measure,
    quick={
        "agreement_length": 70,
        "lengths": [256, 1024],
        "repeats": 1,
        "seeds": 1,
        "data": QUICK_TEXT,
        "training": {
            "width": 32,
            "depth": 1,
            "heads": 2,
            "steps": 3,
            "length": 64,
            "batch": 4,
            "learning_rate": 3e-3,
            "evaluation_tokens": 2048,
        },
    },
    full={
        "agreement_length": 300,
        "lengths": [512, 1024, 2048, 4096, 8192],
        "repeats": 7,
        "seeds": 2,
        "data": "shakespeare",
        "training": {
            "width": 128,
            "depth": 4,
            "heads": 4,
            "steps": 400,
            "length": 256,
            "batch": 8,
            "learning_rate": 3e-3,
            "evaluation_tokens": 65536,
        },
    },
)
