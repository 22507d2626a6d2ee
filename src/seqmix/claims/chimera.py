"""Chimera: two small layers on a frozen model's features guess ahead for it (Zeng et al. 2024)."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._bytes import VOCABULARY, byte_windows, loss_on, spread
from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._speculation import decoded, same_texts
from seqmix.claims._training import QUICK_TEXT, language_model
from seqmix.models.chimera import Chimera

HEADLINE = 2.7  # the paper's mean speed-up over plain decoding
NEAR = 0.8  # share of it that counts as the same
WHOLE, HEADS = "trigram and context", "decoding heads alone"
COMPARED = "attention"  # the kind of model that all drafters are trained for


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
    drawn = found[COMPARED]["drawn"]
    return [
        same_texts(
            "Decoding with the drafter gives the text of plain decoding, greedy or drawn.",
            {**decoding, f"{COMPARED}, drawn": drawn},
        ),
        better_than(drawn, [HEADS], "Guesses are better than those of decoding heads alone."),
        better_than(
            drawn,
            [name for name in DRAFTERS if name not in (WHOLE, HEADS)],
            "Each of the two layers makes guesses better.",
        ),
        faster(decoding, 1.0, "Decoding with the drafter is faster than plain decoding."),
        faster(decoding, NEAR * HEADLINE, f"It is {HEADLINE} times as fast."),
    ]


def studied(run: Run, kind: str) -> dict[str, Any]:
    """A model of this kind and its drafters: their sizes and losses, and what decoding with them gives."""
    from seqmix.generate import Sampling, Shape, SpeculativeTree
    from seqmix.generate.chimera import ChimeraTree
    from seqmix.train.chimera import train_chimera

    rows, held_out = byte_windows(run["data"], run["length"])
    model = language_model(
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
    drawn: dict[str, Any] = {"plain": (model, Sampling())}
    losses = {}
    for name, kind_of_drafter in DRAFTERS.items():
        if name != WHOLE and kind != COMPARED:
            continue
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
        guesses = ChimeraTree(drafter.eval(), tree)
        drawn[name] = (model, SpeculativeTree(drafter=guesses, sampling=Sampling()))
        if name == WHOLE:
            as_chain = SpeculativeTree(drafter=ChimeraTree(drafter, chain))
            ways |= {
                WHOLE: (model, SpeculativeTree(drafter=guesses)),
                f"{WHOLE}, as a chain": (model, as_chain),
            }
            size = sum(p.numel() for p in drafter.parameters())
    prompts = [row[None, : run["prompt"]] for row in spread(held_out, run["prompts"])]
    new = run["new tokens"]
    return {
        "parameters": {"model": model.num_parameters(), "drafter": size},
        "loss of the model": loss_on(model, spread(held_out, run["rows"])),
        "losses of drafters": losses,
        "decoding": decoded(ways, prompts, new_tokens=new, repeats=run["repeats"]),
        "drawn": decoded(drawn, prompts, new_tokens=new),
    }


def better_than(drawn: dict[str, Any], others: list[str], statement: str) -> Finding:
    found = {
        name: way["tokens per check"] for name, way in drawn.items() if name in (WHOLE, *others)
    }
    verdicts = {
        compare_groups([a - b for a, b in zip(found[WHOLE], found[name], strict=True)], [0.0])
        for name in others
    }
    return Finding(
        statement,
        "tokens per check of trees of one size, in texts drawn from the model with attention: above the others by two "
        "standard errors of the difference over prompts",
        {name: {"mean": statistics.fmean(each), "by prompt": each} for name, each in found.items()},
        verdicts.pop() if len(verdicts) == 1 else "inconclusive",
    )


def faster(decoding: dict[str, Any], wanted: float, statement: str) -> Finding:
    measured = {}
    for kind, found in decoding.items():
        times = {
            name: way["milliseconds per token"]
            for name, way in found.items()
            if "milliseconds per token" in way
        }
        best = min((name for name in times if name != "plain"), key=lambda name: times[name])
        measured[kind] = {
            "speed-up": times["plain"] / times[best],
            "with": best,
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
    "models of 3 M parameters on bytes, with attention and recurrent, on a CPU, where the paper has 7 and 13 B on a "
    "GPU.",
    where="abstract; the draft model, and speed and accuracy beside decoding heads",
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
        "layouts": {"attention": "6x[attention]", "recurrent": "6x[mamba2(state_width=16)]"},
        "width": 192,
        "batch": 8,
        "steps": 100,
        "learning_rate": 2e-3,
        "depth": 3,
        "breadth": 3,
        "drafter rows": 320,
        "drafter steps": 80,
        "drafter learning_rate": 2e-3,
        "rows": 64,
        "prompt": 32,
        "prompts": 6,
        "new tokens": 40,
        "repeats": 3,
    },
)
