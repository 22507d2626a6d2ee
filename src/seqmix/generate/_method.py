"""What every way to decode shares: what is asked of it, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqmix.core.errors import DataError, RangeError, ShapeError
from seqmix.generate._reader import Reader, reader_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Task:
    """One prompt to continue, and where to stop.

    `ends` are tokens that end a text, themselves included; `stop` says of the new tokens whether the text ends there.
    `texts` is how many continuations are wanted. A `constraint` forbids tokens: the model's probabilities are those
    of the others, renormalised. `emit` gets every new token of the only text as soon as it is sure.
    """

    prompt: Tensor  # [1, T]
    new_tokens: int
    ends: frozenset[int] = frozenset()
    stop: Callable[[list[int]], bool] | None = None
    texts: int = 1
    seed: int = 0
    constraint: Constraint | None = None
    emit: Callable[[int], object] | None = None

    def __post_init__(self) -> None:
        if self.prompt.ndim != 2 or len(self.prompt) != 1 or not self.prompt.shape[1]:
            raise ShapeError(
                f"`prompt` has shape {list(self.prompt.shape)}, wanted [1, T] with a token."
            )
        for name in ("new_tokens", "texts"):
            at_least(name, getattr(self, name), 1)

    def is_ended(self, ids: list[int]) -> bool:
        """Whether a text of these new tokens ends here, rather than being cut off."""
        return (
            (bool(ids) and ids[-1] in self.ends)
            or (self.stop is not None and self.stop(ids))
            or (self.constraint is not None and self.constraint.is_over(ids))
        )

    def is_finished(self, ids: list[int]) -> bool:
        """Whether a text of these new tokens ends here or has no room for more."""
        return len(ids) >= self.new_tokens or self.is_ended(ids)

    def allowed(self, logits: Tensor, written: list[list[int]]) -> Tensor:
        """The logits [N, V] of what may follow each of `written`, -inf for tokens that the constraint forbids."""
        if self.constraint is None:
            return logits
        masks = [self.constraint.allowed(ids, logits.shape[1], self.ends) for ids in written]
        mask = torch.stack(masks)
        if not bool(mask.any(1).all()):
            raise DataError(
                "The constraint leaves no token to go on with: the tokenizer cannot write the rest of the text."
            )
        return logits.masked_fill(~mask.to(logits.device), -torch.inf)

    def continuation(self, ids: list[int], log_probability: float) -> Continuation:
        """What is given back for these new tokens."""
        return Continuation(ids, log_probability, self.is_ended(ids))


class Constraint(ABC):
    """A language that texts must belong to, as a function of the new tokens so far."""

    @abstractmethod
    def allowed(self, ids: list[int], vocabulary: int, ends: frozenset[int]) -> Tensor:
        """Which tokens [V], as bool, may follow `ids`: `ends` where a text of the language is complete."""

    @abstractmethod
    def is_over(self, ids: list[int]) -> bool:
        """Whether `ids` are a whole text of the language, and nothing can follow."""


@dataclass(frozen=True)
class Continuation:
    """New tokens, and their log-probability in nats under the model, whatever options they were drawn with.

    `is_ended` is false of a text that was cut off after `new_tokens`.
    """

    ids: list[int]
    log_probability: float
    is_ended: bool


class Method(ABC):
    """A way to decode: a frozen dataclass whose fields are its options."""

    @abstractmethod
    def decode(self, reader: Reader, task: Task) -> list[Continuation]:
        """Continuations of the prompt, the best first."""

    def run(
        self, model: PreTrainedModel, prompt: Tensor, *, new_tokens: int, **task: Any
    ) -> list[Continuation]:
        """Continuations of the token ids `prompt` [1, T]; `task` are further fields of `Task`."""
        with torch.inference_mode():
            asked = Task(prompt=prompt, new_tokens=new_tokens, **task)
            return self.decode(reader_of(model), asked)


def at_least(name: str, value: float, least: float) -> None:
    """Raises `RangeError` for an option below `least`."""
    if not value >= least:
        raise RangeError(f"{name}={value}, wanted at least {least}.")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raises `RangeError` for an option outside [low, high]."""
    if not low <= value <= high:
        raise RangeError(f"{name}={value}, wanted {low} to {high}.")
