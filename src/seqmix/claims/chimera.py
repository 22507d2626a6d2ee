"""Chimera: two small layers on a frozen model's features guess ahead for it (Zeng et al. 2024)."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._bytes import VOCABULARY, byte_windows, loss_on, spread
from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._speculation import decoded, same_texts, trained
from seqmix.claims._training import QUICK_TEXT
from seqmix.generate.chimera import Chimera

HEADLINE = 2.7  # the paper's mean speed-up over plain decoding
NEAR = 0.8  # share of it that counts as the same
WHOLE, HEADS = "trigram and context", "decoding heads alone"


class WithoutTrigram(Chimera):
    """Guesses see what the model has read, and no guess before them."""

    def trigrams(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(super().trigrams(ids))


class WithoutContext(Chimera):
    """Guesses see the last three tokens and the features of the last token that was read."""

    def ahead(
        self, near: Tensor, anchor: Tensor, keys: Tensor, values: Tensor, distance: int
    ) -> Tensor:
        return super().ahead(near, anchor, keys, torch.zeros_like(values), distance)


class HeadsAlone(WithoutTrigram, WithoutContext):
    """One head per distance on the features of the last token that was read."""


DRAFTERS = {
    WHOLE: Chimera,
    "without the trigram layer": WithoutTrigram,
    "without the context layer": WithoutContext,
    HEADS: HeadsAlone,
}


def measure(run: Run) -> list[Finding]:
    found = {kind: run.remember(kind, lambda k=kind: studied(run, k)) for kind in run["layouts"]}
    decoding = {kind: one["decoding"] for kind, one in found.items()}
    return [
        same_texts("Decoding with the drafter gives the text of plain decoding.", decoding),
        better_than(decoding, [HEADS], "Guesses are better than those of decoding heads alone."),
        better_than(
            decoding,
            [name for name in DRAFTERS if name not in (WHOLE, HEADS)],
            "Each of the two layers makes guesses better.",
        ),
        faster(decoding, 1.0, "Decoding with the drafter is faster than plain decoding."),
        faster(decoding, NEAR * HEADLINE, f"It is {HEADLINE} times as fast."),
    ]


def studied(run: Run, kind: str) -> dict[str, Any]:
    """A model of this kind and its drafters: their sizes and losses, and what decoding with them gives."""
    from seqmix.generate import Sampling, Shape, SpeculativeTree
    from seqmix.generate.chimera import ChimeraTree, train_chimera

    rows, held_out = byte_windows(run["data"], run["length"])
    model = trained(
        run["layouts"][kind],
        rows,
        width=run["width"],
        vocabulary=VOCABULARY,
        seed=0,
        steps=run["steps"],
        batch=run["batch"],
        learning_rate=run["learning_rate"],
    )
    depth = run["depth"]
    tree = Shape(depth=depth, width=run["breadth"], nodes=2 * depth)
    chain = Shape(depth=depth, width=1, nodes=depth)
    ways: dict[str, Any] = {"plain": (model, Sampling(temperature=0.0))}
    losses = {}
    for name, kind_of_drafter in DRAFTERS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            drafter = kind_of_drafter(model, depth=depth)
        record = train_chimera(
            drafter,
            rows[: run["drafter rows"]],
            steps=run["drafter steps"],
            batch=run["batch"],
            learning_rate=run["drafter learning_rate"],
            seed=0,
        )
        losses[name] = record.history[-1]["loss"]
        ways[f"tree, {name}"] = (
            model,
            SpeculativeTree(drafter=ChimeraTree(drafter.eval(), tree)),
        )
        if name == WHOLE:
            ways[f"chain, {name}"] = (
                model,
                SpeculativeTree(drafter=ChimeraTree(drafter, chain)),
            )
            size = sum(p.numel() for p in drafter.parameters())
    prompts = [row[None, : run["prompt"]] for row in spread(held_out, run["prompts"])]
    return {
        "parameters": {"model": model.num_parameters(), "drafter": size},
        "loss of the model": loss_on(model, spread(held_out, run["rows"])),
        "losses of drafters": losses,
        "decoding": decoded(ways, prompts, new_tokens=run["new tokens"], repeats=run["repeats"]),
    }


def better_than(decoding: dict[str, Any], others: list[str], statement: str) -> Finding:
    measured, verdicts = {}, set()
    for kind, found in decoding.items():
        ours = found[f"tree, {WHOLE}"]["tokens per check"]
        measured[kind] = {WHOLE: statistics.fmean(ours)}
        for name in others:
            theirs = found[f"tree, {name}"]["tokens per check"]
            measured[kind][name] = statistics.fmean(theirs)
            gains = [a - b for a, b in zip(ours, theirs, strict=True)]
            verdicts.add(compare_groups(gains, [0.0]))
    return Finding(
        statement,
        "tokens per check of equal trees, for every kind of model: above the others by two standard errors of the "
        "difference over prompts",
        measured,
        verdicts.pop() if len(verdicts) == 1 else "inconclusive",
    )


def faster(decoding: dict[str, Any], wanted: float, statement: str) -> Finding:
    measured = {}
    for kind, found in decoding.items():
        times = {name: way["milliseconds per token"] for name, way in found.items()}
        ours = {name: time for name, time in times.items() if name.endswith(WHOLE)}
        best = min(ours, key=lambda name: ours[name])
        measured[kind] = {
            "speed-up": times["plain"] / ours[best],
            "with a": best,
            "tokens per check": statistics.fmean(found[best]["tokens per check"]),
            "milliseconds per token": times,
        }
    least = min(one["speed-up"] for one in measured.values())
    return Finding(
        statement,
        f"time per token of plain decoding over that with a tree or a chain, the faster: above {wanted:g} for every "
        "kind of model",
        measured,
        "reproduced" if least > wanted else "not reproduced",
    )


CLAIM = Claim(
    title="Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference by Fusing all Tokens",
    paper="arXiv:2402.15758",
    claimed="A drafter of one layer over the last three tokens and one over the frozen model's features of all earlier "
    "ones guesses better than decoding heads, and makes decoding 2.7 times as fast without changing the text. Here: "
    "models of 4 M parameters on bytes, with attention and recurrent, on a CPU, where the paper has 7 and 13 B on a "
    "GPU.",
    where="abstract; sections 3 and 4, tables 1 to 3",
    measure=measure,
    quick={
        "data": QUICK_TEXT,
        "length": 32,
        "layouts": {"attention": "attention", "recurrent": "mamba2"},
        "width": 16,
        "batch": 4,
        "steps": 1,
        "learning_rate": 2e-3,
        "depth": 2,
        "breadth": 2,
        "drafter rows": 8,
        "drafter steps": 1,
        "drafter learning_rate": 2e-3,
        "rows": 4,
        "prompt": 8,
        "prompts": 2,
        "new tokens": 6,
        "repeats": 1,
    },
    full={
        "data": "shakespeare",
        "length": 64,
        "layouts": {"attention": "8x[attention]", "recurrent": "8x[mamba2]"},
        "width": 192,
        "batch": 8,
        "steps": 120,
        "learning_rate": 2e-3,
        "depth": 3,
        "breadth": 3,
        "drafter rows": 800,
        "drafter steps": 200,
        "drafter learning_rate": 2e-3,
        "rows": 64,
        "prompt": 32,
        "prompts": 8,
        "new tokens": 48,
        "repeats": 3,
    },
)
