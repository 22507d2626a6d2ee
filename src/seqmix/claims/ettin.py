"""Ettin: encoders and decoders from one recipe, each better at its own tasks (Weller et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch

from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._passages import (
    VOCABULARY,
    Passages,
    accuracy_of_works,
    loss_of_last_byte,
    pretrained,
    read_passages,
    recall_of_neighbours,
)
from seqmix.claims._training import QUICK_TEXT

KINDS = ("encoder", "decoder", "decoder made an encoder", "encoder made a decoder")
MEASURES = ("accuracy", "recall", "loss")


def pair(run: Run, passages: Passages, seed: int) -> dict[str, dict[str, float]]:
    """An encoder and a decoder with the same initial weights, each trained, then turned and trained on."""
    from seqmix.convert.causality import redirect
    from seqmix.models.hf import create

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layout = f"{run['depth']}x[attention]"
        fresh = create(layout, width=run["width"], vocabulary=VOCABULARY, mask_token_id=258)

    def train(model: Any, objective: str, steps: str) -> Any:
        return pretrained(model, objective, passages, run.settings, seed, steps=run[steps])

    encoder = train(redirect(fresh, "both"), "masked", "steps")
    decoder = train(redirect(fresh, "causal"), "causal", "steps")
    models = {
        "encoder": encoder,
        "decoder": decoder,
        "decoder made an encoder": train(redirect(decoder, "both"), "masked", "more_steps"),
        "encoder made a decoder": train(redirect(encoder, "causal"), "causal", "more_steps"),
    }
    return {kind: judged(run, passages, model, seed) for kind, model in models.items()}


def judged(run: Run, passages: Passages, model: Any, seed: int) -> dict[str, float]:
    return {
        "accuracy": accuracy_of_works(model, passages, run.settings, seed=seed),
        "recall": recall_of_neighbours(model, passages, run.settings, seed=seed),
        "loss": loss_of_last_byte(model, passages),
    }


def measure(run: Run) -> list[Finding]:
    passages = read_passages(run.settings)
    pairs = [
        run.remember(f"seed {seed}", lambda s=seed: pair(run, passages, s))
        for seed in range(run["seeds"])
    ]
    found = {
        name: {kind: [seed[kind][name] for seed in pairs] for kind in KINDS} for name in MEASURES
    }
    accuracy, recall, loss = (found[name] for name in MEASURES)

    def compare(
        statement: str, expected: str, values: dict[str, list[float]], better: str, worse: str
    ) -> Finding:
        higher, lower = (better, worse) if values is not loss else (worse, better)
        measured = {kind: values[kind] for kind in (better, worse)}
        verdict = compare_groups(values[higher], values[lower])
        return Finding(
            statement, f"{expected}, beyond two standard errors over seeds", measured, verdict
        )

    return [
        compare(
            "Encoders classify better than decoders of the same size and recipe.",
            "the encoder finds the work of more passages",
            accuracy,
            "encoder",
            "decoder",
        ),
        compare(
            "Encoders retrieve better.",
            "the encoder finds the neighbour of more passages, among 32",
            recall,
            "encoder",
            "decoder",
        ),
        compare(
            "Decoders generate better.",
            "the decoder has the lower loss on the last byte of a passage",
            loss,
            "decoder",
            "encoder",
        ),
        compare(
            "A decoder that is trained on as an encoder falls behind the native encoder at classification.",
            "the encoder finds the work of more passages",
            accuracy,
            "encoder",
            "decoder made an encoder",
        ),
        compare(
            "So it does at retrieval.",
            "the encoder finds the neighbour of more passages, among 32",
            recall,
            "encoder",
            "decoder made an encoder",
        ),
        compare(
            "An encoder that is trained on as a decoder falls behind the native decoder at generation.",
            "the decoder has the lower loss on the last byte of a passage",
            loss,
            "decoder",
            "encoder made a decoder",
        ),
    ]


CLAIM = Claim(
    title="Seq vs Seq: An Open Suite of Paired Encoders and Decoders",
    paper="arXiv:2507.11412",
    claimed="With one recipe for both, encoders are better at classification and retrieval and decoders at "
    "generation; training on with the other objective does not make up for it. Here: models of 0.2 M parameters "
    "on bytes of plays, where generation is the prediction of one byte.",
    where="section 4 and section 5 (cross-objective training)",
    measure=measure,
    quick={
        "data": QUICK_TEXT,
        "works": 3,
        "length": 32,
        "width": 16,
        "depth": 1,
        "share": 0.3,
        "batch": 8,
        "learning_rate": 4e-3,
        "steps": 4,
        "more_steps": 2,
        "tuning_steps": 3,
        "tuning_rate": 2e-3,
        "groups": 2,
        "seeds": 1,
    },
    full={
        "data": "shakespeare",
        "works": 10,
        "length": 64,
        "width": 64,
        "depth": 3,
        "share": 0.3,
        "batch": 16,
        "learning_rate": 4e-3,
        "steps": 160,
        "more_steps": 40,
        "tuning_steps": 50,
        "tuning_rate": 2e-3,
        "groups": 16,
        "seeds": 2,
    },
)
