"""What a training objective is: from text to what a model is given, and from the model to a loss.

Axes: B rows, T tokens of a text, S tokens of a source, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from seqmix.core.config import Config
from seqmix.core.errors import ConfigError, ShapeError
from seqmix.data.packing import IGNORED

Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Config):
    """Base of the configurations of objectives."""


class Objective(ABC):
    """Draws what a model is given from whole texts (`inputs`), and scores the model on it (`loss`).

    The two are apart so that batch i of a training run is a function of i: what is random is in `inputs`.
    """

    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig

    def __init__(self, config: ObjectiveConfig | None = None) -> None:
        self.config: Any = self.Config() if config is None else config

    @abstractmethod
    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        """What the model is given, from texts [B, T]; `generator` decides what is random in it."""

    def loss(self, model: Any, inputs: Inputs) -> Tensor:
        """The mean loss of the model in nats per scored token."""
        loss: Tensor = model(**inputs).loss
        return loss

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Inside, `model` has what this objective trains beside it, and nothing of it afterwards."""
        yield


class TargetObjective(Objective):
    """Scores a target [B, T] that follows from a source [B, S].

    The model is one of three: a causal language model, which reads the source and goes on with the target; one with
    `prefix_attention`, which reads the source in both directions first; or an encoder-decoder.
    """

    def loss(self, model: Any, inputs: Inputs) -> Tensor:
        logits = target_logits(model, **inputs)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), inputs["target"].flatten(), ignore_index=IGNORED
        )


def target_logits(
    model: Any, source: Tensor, target: Tensor, source_mask: Tensor | None = None
) -> Tensor:
    """Logits [B, T, V] that score `target` [B, T] after `source` [B, S], by any model that writes.

    `source_mask` marks pads of the source with 0; places of the target with -100 are not scored and are to be at
    its end.
    """
    known = target.clamp_min(0)
    if model.config.is_encoder_decoder:
        logits: Tensor = model(input_ids=source, attention_mask=source_mask, labels=known).logits
        return logits
    if source_mask is not None and not bool(source_mask[:, -1].all()):
        raise ShapeError(
            "source_mask: the last token of a source is a pad, but a language model goes on from there. Put "
            "pads on the left."
        )
    read = model(input_ids=source, attention_mask=source_mask, use_cache=True, logits_to_keep=1)
    if target.shape[1] == 1:
        return read.logits
    rest = model(input_ids=known[:, :-1], past_key_values=read.past_key_values, use_cache=False)
    return torch.cat([read.logits, rest.logits], dim=1)


def check_shares(owner: str, **shares: float) -> None:
    """Raises `ConfigError` for a share outside [0, 1]."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{owner}: {name}={share}, wanted a share from 0 to 1.")


def check_text(owner: str, ids: Tensor, shortest: int) -> None:
    """Raises `ShapeError` unless ids are [B, T] with at least `shortest` tokens."""
    if ids.ndim != 2 or ids.shape[1] < shortest:
        raise ShapeError(
            f"{owner}: `ids` has shape {list(ids.shape)}, wanted [B, T] with at least {shortest} tokens."
        )
