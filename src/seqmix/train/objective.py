"""Training of any model by any objective, on windows of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from seqmix.core.errors import ConfigError, DataError
from seqmix.objectives import Objective
from seqmix.train.loop import run
from seqmix.train.plan import Plan, Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_objective(
    model: PreTrainedModel,
    windows: Tensor,
    objective: Objective,
    *,
    steps: int,
    batch: int = 16,
    learning_rate: float = 2e-3,
    schedule: str = "cosine",
    warmup: float = 0.05,
    weight_decay: float = 0.1,
    seed: int = 0,
    precision: str = "float32",
    progress: bool = False,
) -> Record:
    """Trains `model` in place for `steps` batches of `batch` windows [N, T] of token ids.

    Windows are drawn in an order that changes with every pass over them; order and corruption follow `seed`. The
    other arguments are those of `seqmix.train.train`.

    Raises:
        ConfigError, DataError: for arguments that cannot be used. NumericalError: for a loss that is not finite.
    """
    if batch < 1:
        raise ConfigError(f"batch={batch}, wanted at least 1.")
    if windows.ndim != 2 or not len(windows):
        raise DataError(
            f"windows has shape {list(windows.shape)}, wanted [N, T]: token ids, one window per row."
        )
    plan = Plan(
        steps=steps,
        tokens_per_step=batch * windows.shape[1],
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        seed=seed,
        precision=precision,
        progress=progress,
    )

    def draw(index: int) -> dict[str, Tensor]:
        places = np.arange(index * batch, (index + 1) * batch)
        turns, offsets = np.divmod(places, len(windows))
        order = {
            turn: np.random.default_rng([seed, turn]).permutation(len(windows))
            for turn in {*turns.tolist()}
        }
        rows = [int(order[t][o]) for t, o in zip(turns.tolist(), offsets.tolist(), strict=True)]
        generator = torch.Generator().manual_seed(seed * 2**32 + index)
        return objective.inputs(windows[rows], generator)

    with torch.random.fork_rng(devices=[]), objective.attached(model):
        torch.manual_seed(seed)
        return run(model, draw, plan, loss=objective.loss)


@torch.no_grad()
def objective_loss(
    model: PreTrainedModel, windows: Tensor, objective: Objective, *, batch: int = 64, seed: int = 0
) -> float:
    """The mean loss of `model` over all `windows` [N, T], in nats per scored token, corrupted as `seed` draws."""
    generator = torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    for rows in windows.split(batch):
        loss: Any = objective.loss(model, objective.inputs(rows, generator))
        total, count = total + float(loss) * len(rows), count + len(rows)
    return total / count
