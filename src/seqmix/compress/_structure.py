"""What can be taken out of a model: sublayers, and the units that a sublayer is made of.

A unit is the least that can go while what stays computes as before: a key head with the heads that read it
(attention), a channel of the state space (mamba), a head (mamba2), a hidden neuron (glu, mlp, squared_relu), an expert
(mixture_of_experts). Its weights stand side by side with those of the other units in a few tensors, which are
declared here for every kind of sublayer that has units; the channels of the residual stream likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqmix.linears import Replacement
from seqmix.models.backbone import LanguageModel, ModelSpec, build_channel, build_mixer
from seqmix.models.layout import Entry, Part, parse_part

Place = tuple[int, str]  # the number of a block, and "mixer" or "channel"


class Section(NamedTuple):
    """Neighbouring rows of a tensor: so many for each unit, or so many that belong to all of them."""

    rows: int
    per_unit: bool = True


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of one sublayer.

    `axes` gives for every tensor that holds units the dimension that they stand along, and its sections. The inputs
    of the modules `entrances` have `size` channels for each unit, which is where masks act. `experts` names a list of
    modules that are the units themselves. `reads` are the tensors whose last dimension is the residual stream (those
    of modules called `output` write to it), and `options` the layout's options for a count of units and a width.
    """

    count: int
    axes: Mapping[str, tuple[int, tuple[Section, ...]]]
    reads: tuple[str, ...]
    options: Callable[[int, int], dict[str, Any]]
    size: int = 1
    entrances: tuple[str, ...] = ("output",)
    experts: str | None = None
    least: int = 0  # that must stay; 0 where the whole sublayer may go


def _attention(c: Any) -> Units:
    size = c.heads // c.groups * c.head_width
    queries, keys = (Section(size),), (Section(c.head_width),)
    axes: dict[str, tuple[int, tuple[Section, ...]]] = {"output.weight": (1, queries)}
    for name, sections in (("query", queries), ("key", keys), ("value", keys)):
        axes |= {f"{name}.weight": (0, sections), f"{name}.bias": (0, sections)}

    def options(count: int, width: int) -> dict[str, Any]:
        heads = {"heads": count * (c.heads // c.groups), "head_width": c.head_width}
        return heads | ({} if c.groups == c.heads else {"key_heads": count})

    reads = ("query.weight", "key.weight", "value.weight")
    return Units(count=c.groups, axes=axes, reads=reads, options=options, size=size)


def _mamba(c: Any) -> Units:
    one = (Section(1),)
    first = (
        "convolution.weight",
        "convolution.bias",
        "step_size.weight",
        "step_bias",
        "A_log",
        "D",
    )
    return Units(
        count=c.channels,
        axes={
            "input.weight": (0, (Section(1), Section(1))),
            **dict.fromkeys(first, (0, one)),
            "selection.weight": (1, one),
            "output.weight": (1, one),
        },
        reads=("input.weight",),
        options=lambda count, width: {"expansion": count / width, "step_rank": c.rank},
        entrances=("selection", "output"),
    )


def _mamba2(c: Any) -> Units | None:
    if c.groups > 1:
        return None
    size = c.channels // c.heads
    one, each, maps = (Section(1),), Section(size), Section(2 * c.state_width, per_unit=False)
    return Units(
        count=c.heads,
        axes={
            "input.weight": (0, (each, each, maps, Section(1))),
            "convolution.weight": (0, (each, maps)),
            "convolution.bias": (0, (each, maps)),
            **dict.fromkeys(("step_bias", "A_log", "D"), (0, one)),
            "norm_weight": (0, (each,)),
            "output.weight": (1, (each,)),
        },
        reads=("input.weight",),
        options=lambda count, width: {"heads": count, "expansion": count * size / width},
        size=size,
        entrances=("norm",),
    )


def _hidden(*reading: str) -> Callable[[Any], Units]:
    def units(c: Any) -> Units:
        one = (Section(1),)
        return Units(
            count=c.hidden,
            axes={
                **{f"{name}.{kind}": (0, one) for name in reading for kind in ("weight", "bias")},
                "output.weight": (1, one),
            },
            reads=tuple(f"{name}.weight" for name in reading),
            options=lambda count, width: {"hidden": count},
        )

    return units


def _experts(c: Any) -> Units:
    return Units(
        count=c.experts,
        axes={"router.weight": (0, (Section(1),)), "balance": (0, (Section(1),))},
        reads=("router.weight", "gate.weight", "up.weight"),
        options=lambda count, width: {"experts": count, "hidden": c.hidden},
        entrances=(),
        experts="experts",
        least=c.active,
    )


KINDS: Mapping[str, Callable[[Any], Units | None]] = {
    "attention": _attention,
    "bidirectional_attention": _attention,
    "prefix_attention": _attention,
    "windowed_attention": _attention,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "glu": _hidden("gate", "up"),
    "mlp": _hidden("up"),
    "squared_relu": _hidden("up"),
    "mixture_of_experts": _experts,
}


def language_model(model: nn.Module) -> LanguageModel:
    """The `LanguageModel` inside any of the package's models."""
    inside = model.model
    assert isinstance(inside, LanguageModel)
    return inside


def sublayer(model: nn.Module, place: Place) -> nn.Module:
    """The mixer or channel mixer at a place."""
    module = getattr(language_model(model).backbone.blocks[place[0]], place[1])
    assert isinstance(module, nn.Module)
    return module


def sublayers(model: nn.Module) -> list[Place]:
    """The places of all mixers and channel mixers that are there."""
    blocks = language_model(model).backbone.blocks
    return [
        (number, part)
        for number, block in enumerate(blocks)
        for part in ("mixer", "channel")
        if getattr(block, part) is not None
    ]


def units_of(model: nn.Module) -> dict[Place, Units]:
    """The units of every sublayer that has some and no replaced layer inside."""
    found: dict[Place, Units] = {}
    for place in sublayers(model):
        module = sublayer(model, place)
        kind = KINDS.get(type(module).__module__.rpartition(".")[2])
        units = kind(module.config) if kind else None  # type: ignore[arg-type]
        if units and not any(isinstance(layer, Replacement) for layer in module.modules()):
            found[place] = units
    return found


def parameters_per_unit(module: nn.Module, units: Units) -> int:
    """How many weights go with one unit."""
    if units.experts is not None:
        experts = sum(p.numel() for p in module.get_submodule(units.experts).parameters())
    else:
        experts = 0
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return experts // units.count + sum(
        tensors[name].numel() // tensors[name].shape[dimension] * section.rows
        for name, (dimension, sections) in units.axes.items()
        for section in sections
        if name in tensors and section.per_unit
    )


def flops_per_unit(model: nn.Module, place: Place, units: Units, length: int) -> float:
    """Operations on a text of `length` tokens that go with one unit."""
    spec = model.config.to_spec()  # type: ignore[union-attr, operator]

    def flops(count: int) -> float:
        part = resized(spec, spec.entries()[place[0]], place[1], units, count)
        build: Any = build_mixer if place[1] == "mixer" else build_channel
        with torch.device("meta"):
            return float(build(part, spec).cost(length).flops)

    return flops(1) if units.count == 1 else flops(units.count) - flops(units.count - 1)


def resized(spec: ModelSpec, entry: Entry, part: str, units: Units, count: int) -> Part:
    """How the layout names a sublayer with so many units."""
    given = getattr(entry, part) or parse_part(spec.channel)
    return Part(given.name, {**given.options, **units.options(count, spec.width)})


@contextmanager
def masked(model: nn.Module, masks: Mapping[Place, Tensor]) -> Iterator[None]:
    """Inside the block, units are multiplied by their masks [count]; zeros act as if the units were gone."""
    units = units_of(model)

    def hook(size: int, mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
        spread = mask.repeat_interleave(size)
        return lambda _, inputs: (inputs[0] * spread.to(inputs[0].dtype), *inputs[1:])

    handles = []
    for place, mask in masks.items():
        assert units[place].entrances, "experts are not masked"
        for entrance in units[place].entrances:
            module = sublayer(model, place).get_submodule(entrance)
            handles.append(module.register_forward_pre_hook(hook(units[place].size, mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without(model: nn.Module, places: Sequence[Place]) -> Iterator[None]:
    """Inside the block, these sublayers are not there."""
    blocks = language_model(model).backbone.blocks
    saved = {place: sublayer(model, place) for place in places}
    for number, part in saved:
        setattr(blocks[number], part, None)
    try:
        yield
    finally:
        for (number, part), module in saved.items():
            setattr(blocks[number], part, module)


def keep_best(
    scores: Mapping[Place, Tensor],
    units: Mapping[Place, Units],
    costs: Mapping[Place, float],
    budget: float,
) -> dict[Place, list[int]]:
    """The units that stay when those with the lowest scores go until at least `budget` of their costs is gone."""
    order = sorted(
        (float(score), place, number)
        for place, row in scores.items()
        for number, score in enumerate(row)
    )
    kept = {place: list(range(len(row))) for place, row in scores.items()}
    gone = 0.0
    for _, place, number in order:
        if gone >= budget:
            break
        if len(kept[place]) > units[place].least:
            kept[place].remove(number)
            gone += costs[place]
    return kept
