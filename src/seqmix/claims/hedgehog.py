"""Hedgehog: feature maps that learn to give the weights of softmax attention (Zhang et al. 2024)."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._conversion import (
    OWN_SOURCE,
    Source,
    hybrid_of,
    quality,
    recovered,
    source,
    taught,
)
from seqmix.mixers._mimicry import SpikyFeatures
from seqmix.mixers.linear_attention import FEATURE_MAPS

CLOSED = 0.9  # share of the gap in loss between weights just carried over and the original
LEFT = 0.5  # share of the gap in loss without a window that one may leave
OTHERS = ("elu1", "relu", "softmax")


class Features(nn.Module):
    """f(W x) for a fixed f and a matrix W [K, K] per head that begins as the identity, as Hedgehog's does."""

    def __init__(self, name: str, heads: int, width: int) -> None:
        super().__init__()
        self.function = FEATURE_MAPS[name]
        self.weight = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(torch.einsum("bthk,hfk->bthf", x, self.weight))


def measure(run: Run) -> list[Finding]:
    given = source(run)
    weights = run.remember("attention weights", lambda: mimicry(run, given))
    original = run.remember("original", lambda: quality(given.model, given.held_out))
    found = run.remember("converted", lambda: converted(run, given))
    beside = run.remember("with a window", lambda: taught(run, given, run["with_window"])[1])
    return [
        *near(weights),
        closed(run, original, found),
        windowed(run, original, found["transfer"], beside),
    ]


def mimicry(run: Run, given: Source) -> dict[str, dict[str, float]]:
    """KL from softmax weights and entropies, in nats, means over some layers, after equal training of each map."""
    from seqmix.convert.linearize import inputs_and_outputs, linearized

    blocks = run["blocks"]
    length = run["weights_length"]
    texts = given.learning[: run["weights_windows"], :length]
    pairs = inputs_and_outputs(given.model, blocks, texts)
    tests = inputs_and_outputs(given.model, blocks, given.held_out[:1, :length])
    student = linearized(given.model, "hedgehog", blocks)
    rows: dict[str, list[tuple[float, float]]] = {}
    for number in blocks:
        teacher = given.model.model.backbone.blocks[number].mixer
        mixer = student.model.backbone.blocks[number].mixer
        with torch.no_grad():
            targets, test = (teacher.matrix(some[number][0]) for some in (pairs, tests))
        rows.setdefault("softmax attention", []).append((0.0, entropy(test)))
        for name in ("hedgehog", *OTHERS):
            c = mixer.config
            for which in ("query_features", "key_features"):
                made = SpikyFeatures if name == "hedgehog" else lambda *s, n=name: Features(n, *s)
                setattr(mixer, which, made(c.heads, c.head_width))
            learn(run, mixer, pairs[number][0], targets)
            with torch.no_grad():
                weights = mixer.matrix(tests[number][0])
            rows.setdefault(name, []).append((divergence(test, weights), entropy(weights)))
    return {
        name: {
            "KL": statistics.fmean(kl for kl, _ in found),
            "entropy": statistics.fmean(nats for _, nats in found),
        }
        for name, found in rows.items()
    }


def learn(run: Run, mixer: Any, x: Tensor, targets: Tensor) -> None:
    """Trains the two feature maps on the cross-entropy of the weights, one window [T, D] of x [N, T, D] a step."""
    parameters = [*mixer.query_features.parameters(), *mixer.key_features.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=run["weights_rate"], weight_decay=0.0)
    for step in range(run["weights_steps"]):
        row = step % len(x)
        weights = mixer.matrix(x[row, None]).clamp_min(1e-9)
        loss = -(targets[row, None] * weights.log()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def divergence(p: Tensor, q: Tensor) -> float:
    """The mean of KL(p || q) over rows, of weights [..., T, T]."""
    return float((torch.special.entr(p).neg() - p * q.clamp_min(1e-9).log()).sum(-1).mean())


def entropy(p: Tensor) -> float:
    return float(torch.special.entr(p.clamp_min(0)).sum(-1).mean())


def converted(run: Run, given: Source) -> dict[str, Any]:
    """Losses of the model with Hedgehog in every layer, and in three of four, before and after recovery."""
    student, steps = taught(run, given, "hedgehog")
    hybrid, kept = hybrid_of(run, given, student)
    return {
        "transfer": steps,
        "kept": kept,
        "hybrid, transferred": quality(hybrid, given.held_out),
        "all, recovered": quality(recovered(run, given, student), given.held_out),
    }


def near(rows: dict[str, dict[str, float]]) -> list[Finding]:
    others = {name: rows[name] for name in OTHERS}
    softmax = rows["softmax attention"]["entropy"]
    away = {name: abs(row["entropy"] - softmax) for name, row in rows.items()}
    closest = min(row["KL"] for row in others.values())
    return [
        Finding(
            "Its attention weights are nearer to those of softmax than those of other feature maps trained equally.",
            "a lower KL(softmax || weights), in nats per query, than every other map with a trained matrix, held out",
            {"KL": {name: row["KL"] for name, row in rows.items()}},
            "reproduced" if rows["hedgehog"]["KL"] < closest else "not reproduced",
        ),
        Finding(
            "Its weights are spiky: their entropy is nearer to that of softmax than with other maps.",
            "the smallest difference from the entropy of softmax attention, and a lower entropy than every other map",
            {"entropy": {name: row["entropy"] for name, row in rows.items()}},
            "reproduced"
            if all(
                away["hedgehog"] < away[name] and rows["hedgehog"]["entropy"] < row["entropy"]
                for name, row in others.items()
            )
            else "not reproduced",
        ),
    ]


def closed(run: Run, original: dict[str, float], found: dict[str, Any]) -> Finding:
    losses = {
        "carried over": found["transfer"]["carried over"]["loss"],
        "transferred": found["transfer"]["transferred"]["loss"],
        "recovered": found["all, recovered"]["loss"],
        "hybrid, transferred": found["hybrid, transferred"]["loss"],
        "original": original["loss"],
    }
    gap = losses["carried over"] - losses["original"]
    share = (losses["carried over"] - losses["recovered"]) / gap if gap > 0 else 0.0
    return Finding(
        "A pretrained language model with Hedgehog in every layer recovers most of its perplexity (the paper: GPT-2 "
        "and Llama-2 trained for epochs; here: thousands of tokens).",
        f"training closes at least {CLOSED:.0%} of the gap in loss between weights just carried over and the original",
        {
            "share closed": share,
            "nats per token": losses,
            "tokens": run["transfer_tokens"] + run["recover_tokens"],
            "blocks that the hybrid keeps": found["kept"],
        },
        "reproduced" if share >= CLOSED else "not reproduced",
    )


def windowed(
    run: Run, original: dict[str, float], without: dict[str, Any], beside: dict[str, Any]
) -> Finding:
    """The statement of LoLCATs (arXiv:2410.10254), which builds on Hedgehog."""
    rows = {"without": without, "with": beside}
    gaps = {
        name: {
            step: row[step]["loss"] - original["loss"] for step in ("carried over", "transferred")
        }
        for name, row in rows.items()
    }
    left = gaps["with"]["transferred"] / max(gaps["without"]["transferred"], 1e-9)
    return Finding(
        "A short window of softmax attention beside the feature maps, under one normaliser, loses less: learning the "
        "layer outputs alone comes near the original.",
        f"with {run['with_window']} in every layer, a gap in held-out loss from the original of at most {LEFT:.0%} of "
        "that without the window, after equal transfer",
        {
            "share left": left,
            "gap in nats per token": gaps,
            "relative error of a layer, mean": {
                name: statistics.fmean(row["errors after"].values()) for name, row in rows.items()
            },
            "tokens": run["transfer_tokens"],
        },
        "reproduced" if left <= LEFT else "not reproduced",
    )


CLAIM = Claim(
    title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
    paper="arXiv:2402.04347",
    claimed="a trained feature map of two softmaxes gives attention weights as spiky as softmax attention's and nearer "
    "to them than other maps do, and converts pretrained language models at little loss",
    where="sections 3 to 5; Tables 4, 5 and 10",
    measure=measure,
    quick={
        "model": "tiny",
        "layout": "2x[attention]",
        "data": OWN_SOURCE,
        "length": 192,
        "windows": 4,
        "held_out": 1,
        "blocks": [0, 1],
        "weights_length": 32,
        "weights_windows": 1,
        "weights_steps": 2,
        "weights_rate": 1e-2,
        "damage_windows": 1,
        "with_window": "hedgehog(window=32)",
        "transfer_tokens": 384,
        "transfer_rate": 3e-3,
        "recover_tokens": 384,
        "recover_rate": 1e-3,
    },
    full={
        "model": "smollm2-135m",
        "data": "shakespeare",
        "length": 256,
        "windows": 32,
        "held_out": 6,
        "blocks": [2, 9, 16, 23, 29],
        "weights_length": 128,
        "weights_windows": 8,
        "weights_steps": 60,
        "weights_rate": 1e-2,
        "damage_windows": 1,
        "with_window": "hedgehog(window=64)",
        "transfer_tokens": 6144,
        "transfer_rate": 3e-3,
        "recover_tokens": 4096,
        "recover_rate": 1e-3,
    },
)
