"""Models with only some of their sublayers, units and channels: what goes is gone from the tensors and the layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from seqmix.compress._structure import KINDS, Place, Section, Units, resized, sublayer, units_of
from seqmix.core.errors import ConfigError
from seqmix.models.backbone import ModelSpec
from seqmix.models.layout import Part, parse_part
from seqmix.models.rebuild import rebuild

M = TypeVar("M", bound=PreTrainedModel)


@torch.no_grad()
def cut(
    model: M, kept: Mapping[Place, Sequence[int]], *, channels: Sequence[int] | None = None
) -> M:
    """The model with only these units of the named sublayers, and only these channels of the residual stream.

    A sublayer of which nothing is kept is gone, and its norm and biases with it. With `channels`, the norms are
    rescaled to what they gave when the other channels were zero. Raises `ConfigError` for what cannot be cut.
    """
    spec = model.config.to_spec()
    removed = [place for place, rows in kept.items() if not len(rows)]
    if removed and spec.shortcuts:
        raise ConfigError(
            "The model's residual stream passes a matrix around every sublayer (shortcuts=true), so none can go. "
            "Prune before slicing."
        )
    entries, units = spec.entries(), units_of(model)
    tensors = dict(model.state_dict())
    for place, rows in kept.items():
        number, part = place
        if place in removed:
            entries[number] = dataclasses.replace(entries[number], **{part: Part("none")})
            stem = f"model.backbone.blocks.{number}.{part}"
            tensors = {
                n: t for n, t in tensors.items() if not n.startswith((stem + ".", stem + "_"))
            }
            continue
        if place not in units:
            kind = type(sublayer(model, place)).__name__
            raise ConfigError(
                f"{kind} of block {number} has no heads, neurons or experts that can be cut (or one of its layers "
                f"is replaced). Cut {', '.join(KINDS)}, before other steps, or remove it as a whole."
            )
        if not len(rows) >= units[place].least:
            raise ConfigError(
                f"block {number}: {len(rows)} experts, but every token takes {units[place].least}. Keep more."
            )
        count, smaller = len(rows), resized(spec, entries[number], part, units[place], len(rows))
        if count < units[place].count:
            entries[number] = dataclasses.replace(entries[number], **{part: smaller})
            select_units(tensors, place, units[place], torch.as_tensor(rows))
    gone = tuple(f"backbone.blocks.{number}.{part}." for number, part in removed)
    replaced = {n: layer for n, layer in spec.replaced.items() if not n.startswith(gone)}
    spec = dataclasses.replace(spec.with_entries(entries), replaced=replaced)
    if channels is not None:
        spec = _cut_channels(tensors, spec, units, kept, torch.as_tensor(channels))
    return rebuild(model, spec, tensors)


def select_units(tensors: dict[str, Tensor], place: Place, units: Units, kept: Tensor) -> None:
    """Leaves only these units of a sublayer in the tensors of a model, named as in its state."""
    stem = f"model.backbone.blocks.{place[0]}.{place[1]}."
    for name, (dimension, sections) in units.axes.items():
        if stem + name in tensors:
            rows = _rows(sections, units.count, kept)
            tensors[stem + name] = tensors[stem + name].index_select(dimension, rows)
    if "norm" in units.entrances:  # it averages over fewer channels now
        tensors[stem + "norm_weight"] = (
            tensors[stem + "norm_weight"] * (units.count / len(kept)) ** 0.5
        )
    if units.experts is not None:
        inside = f"{stem}{units.experts}."
        members = {name: tensors.pop(name) for name in list(tensors) if name.startswith(inside)}
        for name, tensor in members.items():
            number, _, leaf = name.removeprefix(inside).partition(".")
            if int(number) in kept:
                tensors[f"{inside}{int((kept == int(number)).nonzero())}.{leaf}"] = tensor


def _rows(sections: Sequence[Section], count: int, kept: Tensor) -> Tensor:
    rows, start = [], 0
    for section in sections:
        inner = torch.arange(section.rows)
        if section.per_unit:
            rows.append((start + kept[:, None] * section.rows + inner).flatten())
            start += section.rows * count
        else:
            rows.append(start + inner)
            start += section.rows
    return torch.cat(rows)


def _cut_channels(
    tensors: dict[str, Tensor],
    spec: ModelSpec,
    units: Mapping[Place, Units],
    kept: Mapping[Place, Sequence[int]],
    channels: Tensor,
) -> ModelSpec:
    """Cuts the residual stream out of all tensors.

    With the other channels at zero, an RMS norm over D channels gives x / sqrt(sum(x^2) / D + eps): over the D' that
    are left it is the same with weights sqrt(D / D') times as large and eps D / D'.
    """
    entries = spec.entries()
    if not channels_can_go(spec, units):
        raise ConfigError(
            "channels: the residual stream can be narrowed in models with RMS norms, without shortcuts and replaced "
            f"layers, of {', '.join(KINDS)}. Use slice for others."
        )
    ratio = spec.width / len(channels)
    for name, tensor in list(tensors.items()):
        if name in (
            "model.embedding.weight",
            "model.head.weight",
            "model.backbone.positions.weight",
            "classifier.weight",
        ):
            tensors[name] = tensor[:, channels]
        elif name.endswith("norm.weight") and tensor.shape == (spec.width,) and _outside(name):
            tensors[name] = tensor[channels] * ratio**0.5
    for place in _present(spec):
        number, part = place
        stem = f"model.backbone.blocks.{number}.{part}."
        count = len(kept.get(place, range(units[place].count)))
        for name in [name for name in tensors if name.startswith(stem)]:
            if name.endswith(tuple("." + read for read in units[place].reads)):
                tensors[name] = tensors[name][:, channels]
            elif name.endswith((".output.weight", ".output.bias")):
                tensors[name] = tensors[name][channels]
        given = getattr(entries[number], part) or parse_part(spec.channel)
        options = {**given.options, **units[place].options(count, len(channels))}
        entries[number] = dataclasses.replace(entries[number], **{part: Part(given.name, options)})
    return dataclasses.replace(
        spec.with_entries(entries), width=len(channels), norm_eps=spec.norm_eps * ratio
    )


def channels_can_go(spec: ModelSpec, units: Mapping[Place, Units]) -> bool:
    """Whether `cut` can narrow the residual stream of such a model."""
    missing = [p for p in _present(spec) if p not in units]
    norms = {spec.norm, spec.last_norm or spec.norm}
    return norms == {"rms"} and not (spec.shortcuts or spec.replaced or missing)


def _present(spec: ModelSpec) -> list[Place]:
    return [
        (number, part)
        for number, entry in enumerate(spec.entries())
        for part in ("mixer", "channel")
        if (getattr(entry, part) or parse_part(spec.channel)).name != "none"
    ]


def _outside(name: str) -> bool:
    """Whether a norm belongs to the backbone or a block, not to a mixer."""
    return name.count(".") <= 5 and ".mixer." not in name and ".channel." not in name
