"""What claims about pruned classifiers share: texts labelled by origin, and an encoder trained to tell them apart.

Windows of bytes are classified by the corpus that they are from. The paper's models are pretrained and then
fine-tuned on tasks of GLUE; ours are trained on the labels alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._passages import BYTES, TRAINING, Passages

HERE = Path(__file__).parent.parent
QUICK = {
    "corpora": [str(HERE / "ops"), str(HERE / "channels")],
    "length": 16,
    "tests": 64,
    "depth": 2,
    "width": 16,
    "heads": 4,
    "hidden": 32,
    "steps": 5,
    "batch": 8,
    "learning_rate": 3e-3,
}
FULL = {
    "corpora": ["shakespeare", "austen", "king_james", "python_docs", "python_code"],
    "length": 48,
    "tests": 2000,
    "depth": 4,
    "width": 64,
    "heads": 4,
    "hidden": 256,
    "steps": 300,
    "batch": 32,
    "learning_rate": 2e-3,
}


def read_corpora(settings: Mapping[str, Any]) -> Passages:
    """Windows of `length` bytes and their corpora: training text first in each, then `tests` windows for tests."""
    from seqmix.data.text import read_text

    length, corpora = settings["length"], settings["corpora"]
    train, test = [], []
    for name in corpora:
        content = "\n".join(read_text(name).documents).encode()
        rows = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        rows = rows[: len(rows) // length * length].view(-1, length)
        end = int(TRAINING * len(rows))
        chosen = torch.linspace(end, len(rows) - 1, settings["tests"] // len(corpora)).long()
        train.append(rows[:end])
        test.append(rows[chosen].long())
    smallest = min(map(len, train))  # equally many of every corpus
    train = [rows[torch.linspace(0, len(rows) - 1, smallest).long()] for rows in train]
    labels = torch.arange(len(corpora))
    return Passages(
        torch.cat(train),
        labels.repeat_interleave(smallest),
        torch.cat(test),
        labels.repeat_interleave(settings["tests"] // len(corpora)),
        len(corpora),
    )


def batch_of(passages: Passages, rows: Tensor) -> dict[str, Tensor]:
    """Training windows with their labels, as the model takes them."""
    return {"input_ids": passages.train[rows].long(), "labels": passages.train_works[rows]}


def trained(settings: Mapping[str, Any], passages: Passages, *, seed: int) -> Any:
    """An encoder with a classifier, trained from `seed`."""
    from seqmix.models.backbone import ModelSpec
    from seqmix.models.encoder import SeqmixForSequenceClassification
    from seqmix.models.hf import SeqmixConfig

    spec = ModelSpec(
        layout=f"{settings['depth']}x[bidirectional_attention/mlp(hidden={settings['hidden']})]",
        width=settings["width"],
        heads=settings["heads"],
        vocabulary=BYTES,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SeqmixForSequenceClassification(
            SeqmixConfig.from_spec(spec, num_labels=passages.works)
        )
    return tuned(model, settings, passages, steps=settings["steps"], seed=seed)


def tuned(
    model: Any,
    settings: Mapping[str, Any],
    passages: Passages,
    *,
    steps: int,
    seed: int,
    rate: float | None = None,
) -> Any:
    """`model` after so many more steps on the labelled windows."""
    from seqmix.train.loop import run
    from seqmix.train.plan import Plan

    size = settings["batch"]
    plan = Plan(
        steps=steps,
        tokens_per_step=size * settings["length"],
        learning_rate=rate or settings["learning_rate"],
        seed=seed,
        progress=False,
    )

    def draw(index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed * 2**32 + index)
        rows = torch.randint(len(passages.train), (size,), generator=generator)
        return batch_of(passages, rows)

    run(model, draw, plan)
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, passages: Passages) -> float:
    """Share of test windows whose corpus is found."""
    model.eval()
    found = torch.cat([model(rows).logits.argmax(-1) for rows in passages.test.split(256)])
    return float((found == passages.test_works).double().mean())


def calibration(passages: Passages, rows: int, *, seed: int = 0) -> Any:
    """So many training windows, drawn at random, for transforms to look at."""
    from seqmix.compress import Calibration

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(passages.train), (rows,), generator=generator)
    return Calibration(windows=passages.train[chosen].long())


def by_magnitude(model: Any, remove: float, length: int) -> Any:
    """The model without its smallest units, at a share of the blocks' operations that is at least `remove`."""
    from seqmix.compress._cut import cut
    from seqmix.compress._structure import (
        flops_per_unit,
        keep_best,
        language_model,
        sublayer,
        units_of,
    )
    from seqmix.compress.magnitude import magnitudes

    units = units_of(model)
    costs = {place: flops_per_unit(model, place, u, length) for place, u in units.items()}
    scores = {place: magnitudes(sublayer(model, place), u) for place, u in units.items()}
    whole = language_model(model).backbone.cost(length).flops
    return cut(model, keep_best(scores, units, costs, remove * whole))


def operations(model: Any, length: int) -> float:
    """Of the blocks, on one window."""
    return float(model.model.backbone.cost(length).flops)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
