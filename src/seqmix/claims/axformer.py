"""AxFormer: parts that hinder a fine-tuned model go, by its loss on the task (Nagarajan et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch

from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._classifier import FULL, QUICK, accuracy, mean, read_corpora, trained
from seqmix.claims._timing import median_milliseconds

SMALLER, FASTER = 1.2, 1.1  # times; the paper's headlines are up to 3.2 and 2.5


def measure(run: Run) -> list[Finding]:
    passages = None

    def one(seed: int) -> dict[str, Any]:
        nonlocal passages
        passages = passages or read_corpora(run.settings)
        return pruned(run, passages, seed)

    seeds = [run.remember(f"seed {seed}", lambda s=seed: one(s)) for seed in range(run["seeds"])]
    return findings(seeds)


def pruned(run: Run, passages: Any, seed: int) -> dict[str, Any]:
    """A classifier before and after pruning by its loss on validation windows, which it was not trained on."""
    from seqmix.compress import TRANSFORMS, Calibration, Work

    model = trained(run.settings, passages, seed=seed)
    validation, rest = split(passages, run["validation"])
    data = Calibration(windows=validation.test, labels=validation.test_works)
    work = Work()
    transform = TRANSFORMS.get("axformer")(tokens=validation.test.numel(), groups=run["groups"])
    small = transform.fit(model, data, work)
    ids = rest.test[: run["batch"]]
    with torch.no_grad():
        times = median_milliseconds(
            {"whole": lambda: model(ids), "pruned": lambda: small(ids)}, run["repeats"]
        )
    return {
        "accuracy": {"whole": accuracy(model, rest), "pruned": accuracy(small, rest)},
        "validation accuracy": {
            "whole": accuracy(model, validation),
            "pruned": accuracy(small, validation),
        },
        "validation loss": work.notes["loss"],
        "weights of the blocks": [
            sum(p.numel() for p in made.model.backbone.parameters()) for made in (model, small)
        ],
        "milliseconds": times,
        "layout": small.config.to_spec().layout,
    }


def split(passages: Any, count: int) -> tuple[Any, Any]:
    """The test windows as `count` for validation, evenly spread, and the others for tests."""
    import dataclasses

    chosen = torch.zeros(len(passages.test), dtype=torch.bool)
    chosen[torch.linspace(0, len(chosen) - 1, count).long()] = True
    first, second = (
        dataclasses.replace(
            passages, test=passages.test[mask], test_works=passages.test_works[mask]
        )
        for mask in (chosen, ~chosen)
    )
    return first, second


def findings(seeds: list[dict[str, Any]]) -> list[Finding]:
    whole, small = ([found["accuracy"][name] for found in seeds] for name in ("whole", "pruned"))
    smaller = mean([a / b for a, b in (found["weights of the blocks"] for found in seeds)])
    faster = mean([f["milliseconds"]["whole"] / f["milliseconds"]["pruned"] for f in seeds])
    validation = all(
        found["validation accuracy"]["pruned"] >= found["validation accuracy"]["whole"]
        for found in seeds
    )
    worse = compare_groups(whole, small) == "reproduced"
    return [
        Finding(
            "Accuracy is no lower after pruning by the validation loss, without any training.",
            "on validation windows no lower in any run, and on other test windows not lower by two standard errors "
            "over seeds",
            {"by seed": seeds},
            "reproduced" if validation and not worse else "not reproduced",
        ),
        Finding(
            "The pruned model is smaller and faster.",
            f"mean over seeds: the blocks at least {SMALLER} times smaller, the model at least {FASTER} times faster "
            "(interleaved medians)",
            {"smaller": smaller, "faster": faster},
            "reproduced" if smaller >= SMALLER and faster >= FASTER else "not reproduced",
        ),
    ]


CLAIM = Claim(
    title="AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more Accurate NLP Models",
    paper="arXiv:2010.03688",
    claimed="Taking out the sublayers, heads and groups of weights that hinder a fine-tuned model makes it up to 4.5% "
    "more accurate, 2.5 times faster and 3.2 times smaller. Here: encoders of 0.2 M parameters that tell five corpora "
    "apart; pruning alone, without tuning after it and without selective hard attention.",
    where="abstract; section 4 (BERT-like models on GLUE and SQuAD there)",
    measure=measure,
    quick={**QUICK, "seeds": 1, "validation": 16, "groups": 2, "repeats": 2},
    full={**FULL, "seeds": 2, "validation": 500, "groups": 8, "repeats": 9},
)
