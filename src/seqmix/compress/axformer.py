"""AxFormer: what does not help on the task goes: sublayers first, then heads and groups of neurons of those that stay,
then what attention reads of irrelevant tokens.

    a part goes if the loss on the task's text without it, and without all that has gone, is at most (1 + tolerance)
    times that of the whole model

Parts are tried from the last block to the first, and units of a sublayer from the smallest magnitude up; a sublayer
that has gone needs no closer look. Selective hard attention is the last level: in every attention layer, queries may
read only their `keys`, 2 `keys`, 4 `keys` ... best keys, and the fewest that the loss allows stay. The loss is that of
the next tokens, or of the classes `labels` of a classifier.
Nagarajan, Sen, Stevens and Raghunathan 2020 (arXiv:2010.03688), without the tuning between the levels. Which keys are
the relevant ones is our reading of the abstract: those with the highest scores, of every query and head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Generic

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.compress._activations import first_inputs, predictions, through
from seqmix.compress._cut import M, cut
from seqmix.compress._structure import (
    Place,
    language_model,
    masked,
    sublayer,
    sublayers,
    units_of,
    without,
)
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.compress.magnitude import magnitudes
from seqmix.core.errors import ConfigError, DataError
from seqmix.mixers._attention import AttentionMixer
from seqmix.models.encoder import SeqmixForSequenceClassification
from seqmix.models.layout import Part
from seqmix.models.rebuild import rebuild


@dataclass(frozen=True, kw_only=True)
class AxFormer(Transform):
    quick: ClassVar = {"tokens": 64, "groups": 2, "keys": 4}

    tolerance: float = 0.0  # by which the loss may rise, as a share
    tokens: int = 1024  # of the task's text
    groups: int = 8  # of units of similar magnitude in a sublayer, each tried as one
    keys: int = 0  # fewest that a query is left with; 0: attention stays as it is. Saves operations, not time here

    def __post_init__(self) -> None:
        if self.tolerance < 0 or self.tokens < 2 or self.groups < 1 or self.keys < 0:
            raise ConfigError(
                f"axformer: tolerance={self.tolerance}, tokens={self.tokens}, groups={self.groups}, keys={self.keys}, "
                "wanted at least 0, 2, 1 and 0."
            )

    def fit(self, model: M, data: Calibration, work: Work) -> M:
        rows = data.rows(self.tokens)
        labels = None
        if isinstance(model, SeqmixForSequenceClassification):
            if data.labels is None:
                raise DataError(
                    "axformer: a classifier is pruned by its loss. Give `labels` with the windows."
                )
            labels = data.labels[rows].to(model.device)
        task = _Task(model, data.windows[rows].to(model.device), labels)
        was_training = model.training
        model.eval()
        try:
            whole, gone, masks = self._prune(task, work)
        finally:
            model.train(was_training)
        kept: dict[Place, Sequence[int]] = dict.fromkeys(gone, ())
        kept |= {place: mask.nonzero().flatten().tolist() for place, mask in masks.items()}
        work.notes["removed"] = [f"{block} {part}" for block, part in gone]
        work.notes["kept"] = {f"{b} {part}": int(mask.sum()) for (b, part), mask in masks.items()}
        task = replace(task, model=cut(model, kept).eval())
        if self.keys:
            chosen = self._select(task, whole * (1 + self.tolerance), work)
            work.notes["keys"] = {f"{block} mixer": keys for block, keys in chosen.items()}
            task = replace(task, model=_hardened(task.model, chosen))
        work.notes["loss"] = [whole, task.loss([], {})]
        return task.model.train(was_training)

    def _prune(self, task: _Task[M], work: Work) -> tuple[float, list[Place], dict[Place, Tensor]]:
        """The loss of the whole model, the sublayers that go, and the masks of the units of others."""
        whole = task.loss([], {})
        bar = whole * (1 + self.tolerance)
        gone: list[Place] = []
        places = sublayers(task.model)
        spec = task.model.config.to_spec()
        inputs = task.inputs([])
        for place in work.track([] if spec.shortcuts else places[::-1], "sublayers"):
            tried = partial(task.loss, [*gone, place], {}, inputs, place[0])
            if work.remember(f"without block {place[0]}, {place[1]}", tried) <= bar:
                gone.append(place)
        inputs = task.inputs(gone)
        masks: dict[Place, Tensor] = {}
        units = {p: u for p, u in units_of(task.model).items() if u.entrances and p not in gone}
        for place in work.track(list(units)[::-1], "heads and neurons"):
            mask = torch.ones(units[place].count)
            order = magnitudes(sublayer(task.model, place), units[place]).argsort()
            for number, members in enumerate(order.tensor_split(min(self.groups, len(order)))):
                less = mask.index_fill(0, members, 0)
                tried = partial(task.loss, gone, {**masks, place: less}, inputs, place[0])
                name = f"without group {number} of block {place[0]}, {place[1]}"
                if less.any() and work.remember(name, tried) <= bar:
                    mask = less
            masks[place] = mask
        return whole, gone, masks

    def _select(self, task: _Task[M], bar: float, work: Work) -> dict[int, int]:
        """The blocks whose queries can do with fewer keys, and with how few."""
        chosen: dict[int, int] = {}
        inputs = task.inputs([])
        readers = _readers(task.model)
        for number in work.track(list(readers)[::-1], "keys"):
            keys = self.keys
            while number not in chosen and keys < self._most(task, readers[number]):
                with _reading(readers, {**chosen, number: keys}):
                    tried = partial(task.loss, [], {}, inputs, number)
                    if work.remember(f"{keys} keys in block {number}", tried) <= bar:
                        chosen[number] = keys
                keys *= 2
        return chosen

    def _most(self, task: _Task[M], mixer: AttentionMixer) -> int:
        """The keys that a query of this layer reads now."""
        c, most = mixer.config, task.windows.shape[1]
        if c.window is not None:
            most = min(most, c.window * (1 if mixer.causal else 2) + c.sinks)
        return most if c.best is None else min(most, c.best)

    def needs(self, model: M, data: Calibration) -> Needs:
        """A candidate costs the blocks from its own on: half of them on average."""
        tried = sum(min(u.count, self.groups) for u in units_of(model).values() if u.entrances)
        tried += len(sublayers(model))
        if self.keys:
            choices = max(0, (data.windows.shape[1] - 1) // self.keys).bit_length()
            tried += len(_readers(model)) * choices
        return Needs(
            forward_tokens=self.tokens * (tried // 2 + 3),
            memory_mb=4 * 2 * self.tokens * model.config.vocab_size / 2**20,
        )


@dataclass(frozen=True, eq=False)
class _Task(Generic[M]):
    """The loss of a model without some of its parts, on windows [N, T] with the labels [N] of a classifier."""

    model: M
    windows: Tensor
    labels: Tensor | None

    @torch.no_grad()
    def inputs(self, gone: Sequence[Place]) -> list[Tensor]:
        """What goes into every block."""
        inside = language_model(self.model)
        found = [first_inputs(inside, self.windows)]
        with without(self.model, gone):
            for block in inside.backbone.blocks:
                found.append(through(block, found[-1]))
        return found

    @torch.no_grad()
    def loss(
        self,
        gone: Sequence[Place],
        masks: Mapping[Place, Tensor],
        inputs: Sequence[Tensor] = (),
        start: int = 0,
    ) -> float:
        """In nats; with the `inputs` of blocks, only those from `start` on are run."""
        inside = language_model(self.model)
        x = inputs[start] if inputs else first_inputs(inside, self.windows)
        with without(self.model, gone), masked(self.model, masks):
            for block in inside.backbone.blocks[start:]:
                x = through(block, x)
        logits = predictions(self.model, x)
        if self.labels is not None:
            return float(F.cross_entropy(logits, self.labels))
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), self.windows[:, 1:].flatten()))


def _readers(model: M) -> dict[int, AttentionMixer]:
    """The attention layers, by the number of their block."""
    blocks = language_model(model).backbone.blocks
    return {n: b.mixer for n, b in enumerate(blocks) if isinstance(b.mixer, AttentionMixer)}


@contextmanager
def _reading(readers: Mapping[int, AttentionMixer], keys: Mapping[int, int]) -> Iterator[None]:
    """Inside the block, queries of these layers read so many keys."""
    saved = {number: readers[number].config for number in keys}
    for number, count in keys.items():
        readers[number].config = replace(saved[number], best=count)
    try:
        yield
    finally:
        for number, config in saved.items():
            readers[number].config = config


def _hardened(model: M, keys: Mapping[int, int]) -> M:
    """The model in which the attention of these blocks reads so many keys."""
    spec = model.config.to_spec()
    entries = spec.entries()
    for number, count in keys.items():
        mixer = entries[number].mixer
        hard = Part(mixer.name, {**mixer.options, "best": count})
        entries[number] = replace(entries[number], mixer=hard)
    return rebuild(model, spec.with_entries(entries), model.state_dict())


TRANSFORM = AxFormer
