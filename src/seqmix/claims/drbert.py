"""DrBERT: a decoder that exists in pretraining only makes a better encoder (Liang and Liang 2024)."""

from __future__ import annotations

from typing import Any

import torch

from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._passages import VOCABULARY, accuracy_of_works, pretrained, read_passages
from seqmix.claims._training import QUICK_TEXT

OBJECTIVES = ("masked", "masked_with_decoder")


def encoder(run: Run, seed: int) -> Any:
    from seqmix.models.encoder import SeqmixForMaskedLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layout = f"{run['depth']}x[bidirectional_attention]"
        return SeqmixForMaskedLM.create(layout, width=run["width"], vocabulary=VOCABULARY)


def measure(run: Run) -> list[Finding]:
    passages = read_passages(run.settings)

    def trained(name: str, seed: int) -> dict[str, float]:
        model = pretrained(
            encoder(run, seed), name, passages, run.settings, seed, steps=run["steps"]
        )
        accuracy = accuracy_of_works(model, passages, run.settings, seed=seed)
        return {"accuracy": accuracy, "parameters": model.num_parameters()}

    found = {
        name: [
            run.remember(f"{name}, seed {seed}", lambda n=name, s=seed: trained(n, s))
            for seed in range(run["seeds"])
        ]
        for name in OBJECTIVES
    }
    accuracy = {name: [seed["accuracy"] for seed in seeds] for name, seeds in found.items()}
    parameters = {name: seeds[0]["parameters"] for name, seeds in found.items()}
    same = len(set(parameters.values())) == 1
    return [
        Finding(
            "After the same number of steps, the encoder that was pretrained with a decoder is better downstream.",
            "a higher accuracy at finding the work that a passage is from, beyond two standard errors over seeds",
            {"accuracy": accuracy, "chance": 1 / passages.works},
            compare_groups(accuracy["masked_with_decoder"], accuracy["masked"]),
        ),
        Finding(
            "Afterwards it costs the same to use.",
            "as many parameters in the same layers",
            {"parameters": parameters},
            "reproduced" if same else "not reproduced",
        ),
    ]


CLAIM = Claim(
    title="DrBERT: Unveiling the Potential of Masked Language Modeling Decoder in BERT pretraining",
    paper="arXiv:2401.15861",
    claimed="A few decoder blocks behind the encoder during masked pretraining, dropped afterwards, raise the "
    "scores of the fine-tuned encoder at no cost of inference. Here: encoders of 0.2 M parameters on bytes of plays, "
    "minutes instead of days, and one downstream task instead of GLUE.",
    where="section 3 and the GLUE table",
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
        "steps": 5,
        "tuning_steps": 5,
        "tuning_rate": 2e-3,
        "seeds": 1,
    },
    full={
        "data": "shakespeare",
        "works": 20,
        "length": 128,
        "width": 64,
        "depth": 3,
        "share": 0.3,
        "batch": 16,
        "learning_rate": 4e-3,
        "steps": 220,
        "tuning_steps": 80,
        "tuning_rate": 2e-3,
        "seeds": 2,
    },
)
