"""Long samples whose response depends on what is far away are found, and are better to train on (Si et al. 2024)."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqmix.analyze.long_range import response_perplexity, segment_attention, segment_perplexity
from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.data.packing import IGNORED
from seqmix.data.selection import contextual_awareness, homologous_guidance, rank

AT_TOP = 0.9  # share of planted samples among as many as there are planted ones
FILLERS, PAYLOADS = 16, 32
MARKER, QUESTION = FILLERS + PAYLOADS, FILLERS + PAYLOADS + 1
VOCABULARY = FILLERS + PAYLOADS + 2
RESPONSE = 4
KINDS = ("far", "near", "unrelated")


def corpus(run: Run, count: int, *, seed: int) -> tuple[Tensor, np.ndarray]:
    """Samples [N, context + 1 + RESPONSE] and the kind of each.

    A context of filler with a marked payload, a question, a response. The payload stands in the first three quarters
    (far) or right before the question (near), and the response repeats it; or (unrelated) it is drawn afresh.
    """
    draw = np.random.default_rng(seed)
    context = run["context"]
    ids = draw.integers(0, FILLERS, (count, context + 1 + RESPONSE))
    kinds = draw.integers(0, len(KINDS), count)
    for row, kind in zip(ids, kinds, strict=True):
        payload, other = draw.permutation(PAYLOADS)[: 2 * RESPONSE].reshape(2, -1) + FILLERS
        far = draw.integers(0, 3 * context // 4 - RESPONSE)
        place = context - RESPONSE - 1 if KINDS[kind] == "near" else far
        row[place : place + 1 + RESPONSE] = [MARKER, *payload]
        row[context] = QUESTION
        row[context + 1 :] = other if KINDS[kind] == "unrelated" else payload
    return torch.from_numpy(ids), kinds


def train(
    run: Run, window: int | None, samples: Callable[[int], Tensor], steps: int, *, seed: int
) -> Any:
    """A model trained on the responses of `samples(i)`; with a window, it sees only so many tokens."""
    from seqmix.models.backbone import ModelSpec
    from seqmix.train.language import new_model
    from seqmix.train.loop import run as loop
    from seqmix.train.plan import Plan

    # Without positions, what is learned on near payloads serves for far ones too.
    options = "rope_base=none" if window is None else f"rope_base=none, window={window}"
    spec = ModelSpec(
        layout=f"short_convolution, attention({options})",
        vocabulary=VOCABULARY,
        depth=2,
        **run["model"],
    )
    model = new_model(spec, seed)

    def batch(index: int) -> dict[str, Tensor]:
        ids = samples(index)
        labels = ids.clone()
        labels[:, :-RESPONSE] = IGNORED
        return {"input_ids": ids, "labels": labels}

    plan = Plan(
        steps=steps,
        tokens_per_step=run["batch"] * (run["context"] + 1 + RESPONSE),
        learning_rate=run["learning_rate"],
        progress=False,
        seed=seed,
    )
    loop(model, batch, plan)
    return model


def pretrained(run: Run, window: int | None, *, seed: int) -> Any:
    """On samples of all kinds, which are not those to select from."""
    return train(
        run,
        window,
        lambda index: corpus(run, run["batch"], seed=10**6 * (seed + 1) + index)[0],
        run["pretraining"],
        seed=seed,
    )


def scores(run: Run, seed: int) -> dict[str, Any]:
    """The kinds of the samples to select from, and both scores of each."""
    ids, kinds = corpus(run, run["samples"], seed=seed)
    short, long = (pretrained(run, window, seed=seed) for window in (run["window"], None))
    perplexities = [response_perplexity(model, ids, response=RESPONSE) for model in (short, long)]
    sizes = {"context": run["context"], "segments": run["segments"], "response": RESPONSE}
    awareness = contextual_awareness(
        segment_attention(long, ids, **sizes), segment_perplexity(long, ids, **sizes)
    )
    return {
        "kinds": kinds.tolist(),
        "guidance": homologous_guidance(*perplexities).tolist(),
        "awareness": awareness.tolist(),
        "perplexity by kind, short and long": {
            name: [values[torch.from_numpy(kinds == i)].mean().item() for values in perplexities]
            for i, name in enumerate(KINDS)
        },
    }


def selected(found: dict[str, Any], alpha: float, count: int) -> list[int]:
    order = rank(torch.tensor(found["guidance"]), torch.tensor(found["awareness"]), alpha=alpha)
    return order[:count].tolist()


def precision(found: dict[str, Any], alpha: float) -> float:
    """The share of planted samples among the first, as many as there are planted ones."""
    planted = [kind == 0 for kind in found["kinds"]]
    return statistics.fmean(planted[i] for i in selected(found, alpha, sum(planted)))


def far_loss(run: Run, chosen: list[int], seed: int) -> float:
    """Of a new model trained on the chosen samples alone: its loss on the responses of new samples whose payload is
    far."""
    ids, _ = corpus(run, run["samples"], seed=seed)
    pool = ids[chosen]
    draw = np.random.default_rng(seed)
    model = train(
        run,
        None,
        lambda index: pool[draw.integers(0, len(pool), run["batch"])],
        run["training"],
        seed=seed,
    )
    tests, kinds = corpus(run, 3 * run["samples"], seed=10**5 + seed)
    far = tests[torch.from_numpy(kinds == 0)]
    return float(response_perplexity(model, far, response=RESPONSE).log().mean())


def measure(run: Run) -> list[Finding]:
    seeds = range(run["seeds"])
    found = [dict(run.remember(f"scores, seed {s}", lambda s=s: scores(run, s))) for s in seeds]
    alphas = {"both": run["alpha"], "guidance alone": 1.0, "awareness alone": 0.0}
    table = {name: [precision(one, alpha) for one in found] for name, alpha in alphas.items()}
    losses: dict[str, list[float]] = {"selected": [], "random": []}
    for seed in seeds:
        chosen = selected(found[seed], run["alpha"], run["chosen"])
        others = np.random.default_rng(50 + seed).permutation(run["samples"])[: run["chosen"]]
        for name, pool in (("selected", chosen), ("random", others.tolist())):
            losses[name].append(
                run.remember(f"{name}, seed {seed}", lambda p=pool, s=seed: far_loss(run, p, s))
            )
    return [
        Finding(
            "Samples whose response depends on what is far away rank at the top.",
            f"share of planted samples among as many as were planted, by both scores: at least {AT_TOP}, the mean over "
            "seeds (a third of the samples is planted)",
            {
                "share of planted samples at the top": table,
                "perplexity by kind, short and long": [
                    one["perplexity by kind, short and long"] for one in found
                ],
            },
            "reproduced" if statistics.fmean(table["both"]) >= AT_TOP else "not reproduced",
        ),
        Finding(
            "Training on the selection beats training on as many random samples.",
            "loss on the responses of new samples whose payload is far: smaller beyond two standard errors over seeds, "
            "at equal steps",
            {"loss": losses, "samples": [run["chosen"], run["samples"]]},
            compare_groups(losses["random"], losses["selected"]),
        ),
    ]


CLAIM = Claim(
    title="Selecting Influential Samples for Long Context Alignment via Homologous Models' Guidance and Contextual "
    "Awareness Measurement",
    paper="arXiv:2410.15633",
    claimed="The gap between the perplexities of a short-context and a long-context model, and how well attention "
    "rests on the segments that help, find the samples rich in long-range dependencies; training on them is better "
    "than on samples at random.",
    where="sections 3 and 4 (7B models on LongAlign; here models of some 15,000 parameters and planted samples of 69 "
    "tokens)",
    measure=measure,
    quick={
        "context": 32,
        "segments": 4,
        "window": 8,
        "model": {"width": 16, "heads": 2},
        "batch": 8,
        "learning_rate": 5e-3,
        "pretraining": 4,
        "training": 4,
        "samples": 24,
        "chosen": 8,
        "alpha": 0.8,
        "seeds": 1,
    },
    full={
        "context": 64,
        "segments": 8,
        "window": 12,
        "model": {"width": 32, "heads": 2},
        "batch": 32,
        "learning_rate": 5e-3,
        "pretraining": 300,
        "training": 200,
        "samples": 600,
        "chosen": 200,
        "alpha": 0.8,
        "seeds": 2,
    },
)
