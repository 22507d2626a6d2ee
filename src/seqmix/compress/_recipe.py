"""Recipes: transforms one after another, such as `finercut:0.25 | slice:0.2 | int8`.

    recipe = step {"|" step}        step = NAME [":" VALUE] ["(" option {"," option} ")"]

`NAME:VALUE` sets the transform's first option.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seqmix.core.errors import ConfigError
from seqmix.models.layout import Part, parse_part

if TYPE_CHECKING:
    from seqmix.compress._transform import Transform

STEP = re.compile(
    r"\s*(?P<name>[A-Za-z_][\w-]*)\s*(:\s*(?P<value>[\w.+/-]+))?\s*(?P<options>\(.*\))?\s*"
)


def parse_recipe(text: str) -> list[Transform]:
    """The transforms of a recipe; raises `ConfigError` or `UnknownName` for what does not parse or exist."""
    return [_parse_step(step) for step in text.split("|")]


def write_recipe(transforms: Sequence[Transform]) -> str:
    """A recipe that parses to these transforms, options that differ from the defaults written out."""
    parts = []
    for transform in transforms:
        default = type(transform)().to_dict()
        changed = {k: v for k, v in transform.to_dict().items() if v != default[k]}
        parts.append(str(Part(transform.name, changed)))
    return " | ".join(parts)


def _parse_step(step: str) -> Transform:
    from seqmix.compress import TRANSFORMS

    found = STEP.fullmatch(step)
    if found is None:
        raise ConfigError(
            f"The step {step.strip()!r} of the recipe does not parse. Wanted NAME, NAME:VALUE or NAME(option=value), "
            f"joined by '|'. Names: {', '.join(TRANSFORMS)}."
        )
    kind = TRANSFORMS.get(found["name"])
    options = dict(parse_part(f"step{found['options'] or ''}").options)
    if found["value"] is not None:
        first = kind.fields()[0]
        if first in options:
            raise ConfigError(f"{step.strip()!r} sets {first} twice. Leave out one of the two.")
        options = {first: parse_part(f"step(x={found['value']})").options["x"], **options}
    made: Transform = kind.from_dict(options, owner=found["name"])
    return made
