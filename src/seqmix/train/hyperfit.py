"""Hyperfitting: training a pretrained language model on a few samples until it knows them by heart.

The loss on held-out text rises, and yet greedy continuations repeat themselves less (Carlsson et al. 2024,
arXiv:2412.04318, Section 3: 2,000 samples of 256 tokens, 20 epochs, batch 8, Adam without weight decay).
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from torch import Tensor

from seqmix.core.errors import RangeError, ShapeError
from seqmix.train.loop import run
from seqmix.train.plan import Plan, Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hyperfit(
    model: PreTrainedModel,
    samples: Tensor,
    *,
    epochs: int = 20,
    batch: int = 8,
    learning_rate: float = 1e-6,
    stop_at: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> Record:
    """Trains all of `model`, in place, on `samples` [N, T] of token ids; the record holds the loss of every step.

    Every epoch takes the samples in the order given, `batch` of them per step. Training ends after `epochs`, or
    after the first whose mean loss, in nats per token, is at most `stop_at`.

    Raises:
        ShapeError: for samples that are not [N, T] with at least two tokens. RangeError: where N is not a
        multiple of `batch`.
    """
    if samples.ndim != 2 or samples.shape[1] < 2:
        raise ShapeError(
            f"hyperfit: `samples` has shape {list(samples.shape)}, wanted [N, T] with T of at least 2."
        )
    if batch < 1 or samples.shape[0] % batch:
        raise RangeError(
            f"hyperfit: batch={batch} for {samples.shape[0]} samples, wanted a divisor of their number."
        )
    per_epoch = samples.shape[0] // batch

    def draw(index: int) -> dict[str, Tensor]:
        start = index % per_epoch * batch
        rows = samples[start : start + batch]
        return {"input_ids": rows, "labels": rows}

    def is_known(record: Record) -> dict[str, float]:
        start = record.steps - per_epoch
        losses = [entry["loss"] for entry in record.history if entry["step"] > start]
        losses.append(record.loss_sum / record.loss_steps)  # not in the history yet
        return {"stop": float(statistics.fmean(losses) <= stop_at)}

    plan = Plan(
        steps=epochs * per_epoch,
        tokens_per_step=batch * samples.shape[1],
        learning_rate=learning_rate,
        schedule="warmup_stable_decay",
        weight_decay=0.0,
        seed=seed,
        observe_every=per_epoch,
        progress=progress,
    )
    return run(model, draw, plan, observe=is_known)
