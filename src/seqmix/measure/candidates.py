"""From `attention; mamba2; 3x[gated_delta_net], attention` to specifications of equal size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from seqmix.channels import CHANNELS
from seqmix.core.catalog import Catalog
from seqmix.core.errors import ConfigError, LayoutError, RangeError, UnknownName
from seqmix.mixers import MIXERS
from seqmix.models.backbone import ModelSpec, count_parameters
from seqmix.models.layout import parse_layout, parse_part

WIDEST = 2**14


@dataclass(frozen=True)
class Candidate:
    """A layout, the specification that stands for it, and its real number of parameters."""

    layout: str
    spec: ModelSpec
    parameters: int


def split_candidates(text: str | Sequence[str]) -> list[str]:
    """The layouts of a text separated by `;`, or of a list; every one parses and names known mixers.

    Raises `LayoutError` with a caret, `UnknownName` with suggestions, or `ConfigError` for a wrong option.
    """
    parts = text.split(";") if isinstance(text, str) else list(text)
    layouts = [" ".join(part.split()) for part in parts if part.strip()]
    if not layouts:
        raise LayoutError(
            "There are no candidates. Give layouts separated by ';', such as \"attention; mamba2\"."
        )
    for layout in layouts:
        for entry in parse_layout(layout):
            mixer = _known(MIXERS, entry.mixer.name, layout)
            if not mixer.causal:
                raise ConfigError(
                    f"Candidate {layout!r}: {entry.mixer.name} reads the future, so it cannot predict the "
                    "next token. Use a causal mixer. Nothing was trained."
                )
            if entry.channel is not None and entry.channel.name != "none":
                _known(CHANNELS, entry.channel.name, layout)
    if len(set(layouts)) < len(layouts):
        twice = next(layout for layout in layouts if layouts.count(layout) > 1)
        raise LayoutError(
            f"The candidate {twice!r} is given twice. Leave one out; seeds=N repeats all."
        )
    return layouts


def _known(catalog: Catalog, name: str, layout: str) -> Any:
    try:
        return catalog.get(name)
    except UnknownName as error:
        raise UnknownCandidate(error, layout) from None


class UnknownCandidate(UnknownName):
    """An unknown name, with the candidate that holds it."""

    def __init__(self, error: UnknownName, layout: str) -> None:
        LookupError.__init__(self, f"Candidate {layout!r}: {error.args[0]} Nothing was trained.")


def build_candidates(
    layouts: Sequence[str],
    *,
    width: int,
    depth: int,
    heads: int = 4,
    vocabulary: int = 258,
    channel: str = "glu",
    parameters: int | None = None,
) -> list[Candidate]:
    """A candidate per layout: of the given width, or, with `parameters`, of about that many parameters.

    A layout longer than `depth` is kept whole, and any layout is repeated to a whole number of times that
    reaches `depth`. Equal parameters are reached by the width, in steps of 8 per head, and then by the
    expansion of the channel mixer, where the layout leaves that open.
    """
    if min(width, depth, heads) < 1:
        raise RangeError(
            f"width={width}, depth={depth}, heads={heads}, wanted all to be at least 1."
        )
    found = []
    for layout in layouts:
        written = len(parse_layout(layout))
        spec = ModelSpec(
            layout=layout,
            width=width,
            depth=written * math.ceil(depth / written),
            heads=heads,
            channel=channel,
            vocabulary=vocabulary,
        )
        if parameters is not None:
            spec = of_size(spec, parameters)
        found.append(Candidate(layout, spec, count_parameters(spec)))
    return found


def of_size(spec: ModelSpec, parameters: int) -> ModelSpec:
    """`spec` with the width, and where possible the channel expansion, that give about `parameters`."""
    step = 8 * spec.heads

    def size(multiple: int) -> int:
        return count_parameters(replace(spec, width=multiple * step))

    low, high = 1, WIDEST // step
    if size(low) > 1.5 * parameters:
        raise ConfigError(
            f"parameters={parameters}: {spec.layout!r} of depth {spec.depth} has {size(low)} at its "
            f"smallest width {step}. Ask for more parameters, or fewer blocks or heads."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= parameters else (low, middle)
    nearest = min((low, low + 1), key=lambda multiple: abs(math.log(size(multiple) / parameters)))
    return _with_expansion(replace(spec, width=nearest * step), parameters)


def _with_expansion(spec: ModelSpec, parameters: int) -> ModelSpec:
    """The channel expansion that brings `spec` to `parameters`: the count is linear in it."""
    part = parse_part(spec.channel)
    if part.name == "none" or "expansion" in part.options:
        return spec
    config = CHANNELS.get(part.name).Config
    if "expansion" not in config.fields():
        return spec
    expansion = config(width=spec.width).expansion

    def at(value: float) -> ModelSpec:
        options = dict(part.options) | {"expansion": f"{value:.4f}"}
        written = ", ".join(f"{key}={option}" for key, option in options.items())
        return replace(spec, channel=f"{part.name}({written})")

    base, more = count_parameters(at(expansion)), count_parameters(at(expansion + 1))
    if more == base:  # every entry names its own channel mixer
        return spec
    wanted = expansion + (parameters - base) / (more - base)
    return at(min(max(wanted, expansion / 4), expansion * 4))
