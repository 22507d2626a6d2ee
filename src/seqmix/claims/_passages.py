"""What claims about encoders share: labelled passages of a text, and what a pretrained model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.data.text import read_text

BYTES, MASK, VOCABULARY = 256, 258, 259
TEMPERATURE = 0.1  # of similarities, in contrastive training
TRAINING = 0.8  # of every work, the rest is for tests


@dataclass(frozen=True)
class Passages:
    """Windows [N, T] of bytes and the work [N] that each is from; neighbours stand next to each other."""

    train: Tensor
    train_works: Tensor
    test: Tensor
    test_works: Tensor
    works: int


def read_passages(settings: Mapping[str, Any]) -> Passages:
    """The first `works` documents of `data` in windows of `length` bytes, the end of each work for tests."""
    length, works = settings["length"], settings["works"]
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for document in read_text(settings["data"]).documents[:works]:
        content = np.frombuffer(document.encode(), dtype=np.uint8).astype(np.int64)
        rows = torch.from_numpy(content[: len(content) // length * length].reshape(-1, length))
        cut = int(TRAINING * len(rows))
        parts["train"].append(rows[:cut])
        parts["test"].append(rows[cut:])
    labels = {
        name: torch.repeat_interleave(torch.tensor([len(rows) for rows in found]))
        for name, found in parts.items()
    }
    return Passages(
        torch.cat(parts["train"]),
        labels["train"],
        torch.cat(parts["test"]),
        labels["test"],
        works,
    )


def pretrained(
    model: Any,
    name: str,
    passages: Passages,
    settings: Mapping[str, Any],
    seed: int,
    **options: Any,
) -> Any:
    """`model` after `steps` batches by the objective `name`."""
    from seqmix.objectives import OBJECTIVES
    from seqmix.train.objective import train_objective

    kind = OBJECTIVES.get(name)
    known = {"mask_id": MASK, "vocabulary": BYTES, "share": settings["share"]}
    fields = {key: value for key, value in known.items() if key in kind.Config.fields()}
    train_objective(
        model,
        passages.train,
        kind(kind.Config.from_dict(fields)),
        steps=options["steps"],
        batch=settings["batch"],
        learning_rate=settings["learning_rate"],
        seed=seed,
    )
    return model


def accuracy_of_works(
    model: Any, passages: Passages, settings: Mapping[str, Any], *, seed: int
) -> float:
    """Share of test passages whose work is found, after training a copy with a classifier on it."""
    from seqmix.models.encoder import SeqmixForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = SeqmixForSequenceClassification.of(model, num_labels=passages.works)

    def batch(rows: Tensor) -> dict[str, Tensor]:
        return {"input_ids": passages.train[rows], "labels": passages.train_works[rows]}

    _tune(classifier, len(passages.train), batch, settings, seed)
    with torch.no_grad():
        found = torch.cat([classifier(rows).logits.argmax(-1) for rows in passages.test.split(256)])
    return float((found == passages.test_works).double().mean())


def recall_of_neighbours(
    model: Any, passages: Passages, settings: Mapping[str, Any], *, seed: int
) -> float:
    """Share of test passages whose successor is the most similar of all successors in a group of 32, after training."""
    from seqmix.models.encoder import SeqmixEncoder, mean_of_tokens
    from seqmix.models.hf import SeqmixConfig

    encoder = SeqmixEncoder(SeqmixConfig.from_spec(model.config.to_spec()))
    encoder.model.load_state_dict(model.model.state_dict())

    def similarity(first: Tensor, second: Tensor) -> Tensor:
        a, b = (
            F.normalize(mean_of_tokens(encoder.features(rows)), dim=-1) for rows in (first, second)
        )
        return a @ b.T

    def loss(_: Any, inputs: dict[str, Tensor]) -> Tensor:
        scores = similarity(inputs["first"], inputs["second"]) / TEMPERATURE
        return F.cross_entropy(scores, torch.arange(len(scores)))

    def batch(rows: Tensor) -> dict[str, Tensor]:
        return {"first": passages.train[rows], "second": passages.train[rows + 1]}

    _tune(encoder, len(passages.train) - 1, batch, settings, seed, loss=loss)
    order = torch.randperm(len(passages.test) - 1, generator=torch.Generator().manual_seed(0))
    groups = order[: settings["groups"] * 32].view(-1, 32)
    with torch.no_grad():
        hits = [
            similarity(passages.test[rows], passages.test[rows + 1]).argmax(-1) == torch.arange(32)
            for rows in groups
        ]
    return float(torch.cat(hits).double().mean())


@torch.no_grad()
def loss_of_last_byte(model: Any, passages: Passages) -> float:
    """Nats on the last byte of test passages: a masked model sees a mask there, a causal one nothing."""
    from seqmix.models.encoder import SeqmixForMaskedLM

    total = 0.0
    for rows in passages.test.split(256):
        if isinstance(model, SeqmixForMaskedLM):
            shown = torch.cat([rows[:, :-1], torch.full_like(rows[:, :1], MASK)], dim=1)
        else:
            shown = rows[:, :-1]
        logits = model(input_ids=shown).logits[:, -1]
        total += float(F.cross_entropy(logits, rows[:, -1], reduction="sum"))
    return total / len(passages.test)


def _tune(
    model: Any,
    count: int,
    batch: Callable[[Tensor], dict[str, Tensor]],
    settings: Mapping[str, Any],
    seed: int,
    loss: Any = None,
) -> None:
    from seqmix.train.loop import run
    from seqmix.train.plan import Plan

    size = 32
    plan = Plan(
        steps=settings["tuning_steps"],
        tokens_per_step=size * settings["length"],
        learning_rate=settings["tuning_rate"],
        seed=seed,
        progress=False,
    )

    def draw(index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed * 2**32 + index)
        return batch(torch.randint(count, (size,), generator=generator))

    run(model, draw, plan, loss=loss)
