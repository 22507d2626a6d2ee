"""How to train, and what a run has done so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from seqmix.core.errors import ConfigError
from seqmix.mixers._mixer import undecayed
from seqmix.train.schedule import check_schedule

PRECISIONS = {"float32": False, "bfloat16": True}  # whether it takes autocast


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train; one of `steps` and `seconds` ends the run."""

    steps: int | None = None
    seconds: float | None = None
    tokens_per_step: int
    learning_rate: float
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    accumulate: int = 1
    precision: str = "float32"
    seed: int = 0
    save_every: int | None = None
    observe_every: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_schedule(self.schedule, self.warmup)
        if (self.steps is None) == (self.seconds is None):
            raise ConfigError("Give exactly one budget: steps, tokens or seconds.")
        for name in ("steps", "seconds", "learning_rate", "accumulate", "save_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value}, wanted more than 0.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision={self.precision!r}, wanted float32 or bfloat16.")


@dataclass
class Record:
    """What a run has used and measured so far; part of every checkpoint.

    `seconds` leaves out start-up: the clock of each process starts after its first step, and stands still
    while a checkpoint is written or the model evaluated. `timed_tokens` are those of the steps it timed.
    """

    steps: int = 0
    tokens: int = 0
    timed_tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    loss_sum: float = 0.0  # of the steps since the last entry of the history
    loss_steps: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.timed_tokens / self.seconds if self.seconds else 0.0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors, embeddings and what modules list in `no_weight_decay` do not."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    listed = undecayed(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = name in listed or id(parameter) in embeddings
            (others if parameter.ndim < 2 or spared else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
