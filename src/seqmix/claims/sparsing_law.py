"""Activation sparsity grows with data for ReLU and shrinks for SiLU (Luo et al. 2024)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.claims._claim import Claim, Finding, Run, Verdict, compare_groups
from seqmix.claims._training import QUICK_TEXT
from seqmix.data.language_modelling import LanguageModelling, language_modelling
from seqmix.data.packing import Packed
from seqmix.measure.activation_sparsity import Mask, activation_sparsity, recorded, sparsest
from seqmix.measure.sparsity_laws import Law, falling_logspace_power_law, rising_power_law
from seqmix.models.backbone import ModelSpec
from seqmix.models.channel_mixers import channel_outputs

COMPARABLE = 0.02  # difference of losses, as a share
EXPLAINED = 0.9  # of the variance, by a law
LINEAR = 0.9  # correlation
LAWS = {"silu": rising_power_law, "relu": falling_logspace_power_law}

Point = dict[str, float]


@cache
def text(data: str, length: int) -> LanguageModelling:
    return language_modelling(data, length=length)


def spread(packed: Packed, rows: int) -> Tensor:
    """So many windows, evenly spread over the text."""
    places = (
        torch.linspace(0, packed.windows - 2, rows).round().long()
    )  # the last one may be padded
    return packed.batch(places.numpy())["input_ids"]


def checkpoints(run: Run, activation: str, width: int, depth: int, *, seed: int) -> list[Point]:
    """Tokens, share of active neurons and loss at each checkpoint of one training run, before any decay of the
    learning rate."""
    from seqmix.train.language import new_model, shuffled
    from seqmix.train.loop import run as train
    from seqmix.train.plan import Plan, Record

    steps = run["steps"] if (width, depth) == tuple(run["shape"]) else [run["shape_steps"]]

    def measure() -> list[Point]:
        data = text(run["data"], run["length"])
        spec = ModelSpec(
            layout="attention",
            width=width,
            depth=depth,
            heads=4,
            channel=f"glu(activation={activation})",
            vocabulary=data.vocabulary,
        )
        model = new_model(spec, seed)
        held_out = spread(data.validation.packed, run["rows"])
        points = []

        def observe(record: Record) -> dict[str, float]:
            if record.steps in steps:
                found = activation_sparsity(model, held_out)
                points.append(
                    {"tokens": record.tokens, "ratio": found.ratio, "loss": found.dense_loss}
                )
            return {"stop": record.steps >= max(steps)}

        plan = Plan(
            steps=2
            * max(steps),  # never reached: the observer stops before the learning rate decays
            tokens_per_step=run["batch"] * run["length"],
            learning_rate=run["learning_rate"],
            schedule="warmup_stable_decay",
            observe_every=math.gcd(*steps),
            seed=seed,
            progress=False,
        )
        draw = shuffled(data.train.packed, run["batch"], seed=seed, keep_segments=True)
        train(model, draw, plan, observe=observe)
        return points

    name = f"{activation}, width {width}, depth {depth}, seed {seed}"
    return [dict(point) for point in run.remember(name, measure)]


def over_seeds(run: Run, activation: str) -> list[list[Point]]:
    width, depth = run["shape"]
    return [checkpoints(run, activation, width, depth, seed=seed) for seed in range(run["seeds"])]


def measure(run: Run) -> list[Finding]:
    return [
        trend(run, "silu", "rises", 1),
        trend(run, "relu", "falls", -1),
        relu_needs_fewer(run),
        linear_in_shape(run),
        better_than_one_size(run),
    ]


def trend(run: Run, activation: str, word: str, sign: int) -> Finding:
    seeds = over_seeds(run, activation)
    slopes, laws = [], []
    for points in seeds:
        tokens, ratios = ([point[name] for point in points] for name in ("tokens", "ratio"))
        slopes.append(
            sign * statistics.linear_regression([math.log(d) for d in tokens], ratios).slope
        )
        laws.append(LAWS[activation](tokens, ratios))
    verdict = compare_groups(slopes, [0.0])
    if verdict == "reproduced" and statistics.fmean(law.explained for law in laws) < EXPLAINED:
        verdict = "inconclusive"
    law = "a converging power law" if activation == "silu" else "a power law in log space"
    return Finding(
        f"{activation}: the share of neurons needed at 1% higher perplexity {word} with the training data, by {law}.",
        f"the slope of the share against the logarithm of the tokens is {'above' if sign > 0 else 'below'} zero "
        f"beyond two standard errors over seeds, and the law explains at least {EXPLAINED} of the variance",
        {
            "tokens": [point["tokens"] for point in seeds[0]],
            "shares by seed": [[point["ratio"] for point in points] for points in seeds],
            "slope per factor e of tokens": [sign * slope for slope in slopes],
            "laws": [plain(law) for law in laws],
        },
        verdict,
    )


def plain(law: Law) -> dict[str, float]:
    return {"limit": law.limit, "exponent": law.exponent, "explained": law.explained}


def relu_needs_fewer(run: Run) -> Finding:
    last = {name: [points[-1] for points in over_seeds(run, name)] for name in ("silu", "relu")}
    shares = {name: [point["ratio"] for point in points] for name, points in last.items()}
    losses = {name: statistics.fmean(p["loss"] for p in points) for name, points in last.items()}
    difference = abs(losses["relu"] / losses["silu"] - 1)
    verdict = compare_groups(shares["silu"], shares["relu"])
    if verdict == "reproduced" and difference > COMPARABLE:
        verdict = "not reproduced"
    return Finding(
        "ReLU needs fewer active neurons than SiLU at comparable quality.",
        "at the last checkpoint: a smaller share beyond two standard errors over seeds, at losses within "
        f"{COMPARABLE:.0%}",
        {"shares": shares, "losses": losses, "difference of losses": difference},
        verdict,
    )


def linear_in_shape(run: Run) -> Finding:
    """Models of about equal size at the same number of tokens."""
    by_shape: dict[float, list[float]] = {}
    for width, depth in run["shapes"]:
        by_shape[width / depth] = [
            next(
                point["ratio"]
                for point in checkpoints(run, "relu", width, depth, seed=seed)
                if point["tokens"] == run["shape_steps"] * run["batch"] * run["length"]
            )
            for seed in range(run["seeds"])
        ]
    shares = [statistics.fmean(values) for values in by_shape.values()]
    correlation = statistics.correlation(list(by_shape), shares)
    verdict: Verdict = "reproduced" if correlation >= LINEAR else "inconclusive"
    return Finding(
        "relu: at a fixed size the share of neurons needed grows linearly with width / depth, below a bottleneck.",
        f"correlation of the share (mean over seeds) with width / depth at least {LINEAR}; at most 0 refutes it",
        {"shares by width / depth": by_shape, "correlation": correlation},
        "not reproduced" if correlation <= 0 else verdict,
    )


def better_than_one_size(run: Run) -> Finding:
    """The paper's metric against one number of neurons for all layers, and one threshold for all layers."""

    def measure() -> dict[str, Any]:
        model, ids = pretrained(run) if run["pretrained"] else small(run)
        own = activation_sparsity(model, ids)
        return {
            "neurons": sum(layer.in_features for layer in channel_outputs(model)),
            "loss": own.dense_loss,
            "equal error of truncation (PPL-1%)": own.ratio,
            "same number in all layers (top-k)": other(model, ids, same_number),
            "same threshold in all layers (FAT)": other(model, ids, same_threshold),
            "PPL-1%, smallest and largest layer": [min(own.by_layer), max(own.by_layer)],
        }

    name = run["pretrained"] or "small model"
    found = dict(run.remember(f"metrics on {name}", measure))
    own, top, fat = (value for key, value in found.items() if key.endswith(")"))
    return Finding(
        f"Equal errors of truncation need fewer neurons than one number or one threshold for all layers ({name}).",
        "at 1% higher perplexity, a smaller share of active neurons than either",
        found,
        "reproduced" if own < min(top, fat) else "not reproduced",
    )


def pretrained(run: Run) -> tuple[nn.Module, Tensor]:
    from seqmix.models.pretrained import load

    model, tokenizer = load(run["pretrained"])
    assert tokenizer is not None
    words = text(run["data"], run["length"]).corpus.documents[-1]
    ids = tokenizer(words[:10000], return_tensors="pt")["input_ids"][0]
    rows, length = run["pretrained_rows"]
    return model, ids[: rows * length].view(rows, length)


def small(run: Run) -> tuple[nn.Module, Tensor]:
    from seqmix.train.language import new_model

    data = text(run["data"], run["length"])
    spec = ModelSpec(layout="attention", width=32, depth=2, vocabulary=data.vocabulary)
    return new_model(spec, 0), spread(data.validation.packed, run["rows"])


def other(model: nn.Module, ids: Tensor, metric: Callable[[nn.Module, Tensor], Any]) -> float:
    return sparsest(model, ids, metric(model, ids), increase=0.01).ratio


def same_number(model: nn.Module, ids: Tensor) -> Callable[[float], Mask]:
    def keep(setting: float) -> Mask:
        def mask(index: int, x: Tensor) -> Tensor:
            kept = max(1, round((1 - setting) * x.shape[-1]))
            return x.abs() >= x.abs().topk(kept, dim=-1).values[..., -1:]

        return mask

    return keep


def same_threshold(model: nn.Module, ids: Tensor) -> Callable[[float], Mask]:
    """The setting is the share of all activations of the whole model that are below the threshold."""
    with recorded(channel_outputs(model)) as seen, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    sizes = torch.cat([x.abs().flatten()[::7] for layer in seen for x in layer]).sort().values

    def keep(setting: float) -> Mask:
        threshold = sizes[round(setting * (len(sizes) - 1))]
        return lambda index, x: x.abs() > threshold

    return keep


CLAIM = Claim(
    title="Sparsing Law: Towards Large Language Models with Greater Activation Sparsity",
    paper="arXiv:2411.02335",
    claimed="The share of neurons that a decoder needs at 1% higher perplexity rises with the training data for "
    "SiLU, as a converging power law, and falls for ReLU, at comparable quality; at a fixed size it grows linearly "
    "with the ratio of width to depth up to a bottleneck; and errors of truncation that are equal in all layers "
    "measure sparsity better than one number of neurons or one threshold for all.",
    where="sections 3 and 4 (models of 0.1B to 1.2B parameters; here some 30,000, and at most 64 tokens per parameter)",
    measure=measure,
    quick={
        "data": QUICK_TEXT,
        "length": 32,
        "batch": 8,
        "rows": 8,
        "learning_rate": 5e-3,
        "seeds": 1,
        "shape": [16, 2],
        "steps": [4, 8, 12, 16],
        "shapes": [[16, 2], [24, 1]],
        "shape_steps": 8,
        "pretrained": None,
    },
    full={
        "data": "shakespeare",
        "length": 64,
        "batch": 32,
        "rows": 48,
        "learning_rate": 5e-3,
        "seeds": 2,
        "shape": [32, 2],
        "steps": [128, 256, 384, 512, 768, 1024],
        "shapes": [[16, 8], [24, 4], [32, 2], [48, 1]],
        "shape_steps": 256,
        "pretrained": "smollm2-135m",
        "pretrained_rows": [3, 128],
    },
)
