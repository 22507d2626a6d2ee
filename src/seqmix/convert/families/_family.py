"""What a family of models of transformers is to this package: a specification, and where each weight goes.

A family is described once, for both ways: `spec` reads a configuration, and `weights` pairs tensors of the library
with ours. A model goes back as long as its specification is still the one that its first configuration gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from seqmix.channels import CHANNELS
from seqmix.core.errors import ConfigError
from seqmix.mixers import MIXERS
from seqmix.models._hf_model import SeqmixModel
from seqmix.models.backbone import ModelSpec
from seqmix.models.layout import Part

SHAPE = ("heads", "key_heads", "head_width")  # options of attention that are always written
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Weights:
    """Tensors of the library and those of this package that hold the same numbers.

    `load` makes ours from theirs, `save` theirs from ours; both take and give as many tensors as there are names.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    load: Callable[..., Tensors]
    save: Callable[..., Tensors]


@dataclass(frozen=True)
class Family:
    """Models of transformers with one set of blocks.

    `spec` raises `ConfigError`, naming the field, for what this package does not compute; `weights` lists every tensor
    of the library's but tied ones. `kinds` are the classes of models; without any, a family has language models.
    `tensors` gives the weights of a model of the library that are taken along, and `build` makes such a model without
    weights from a configuration with `architectures`.
    """

    model_types: tuple[str, ...]
    spec: Callable[[Any], ModelSpec]
    weights: Callable[[Any], Iterator[Weights]]
    kinds: Mapping[str, type[SeqmixModel]] = dataclasses.field(default_factory=dict)
    tensors: Callable[[PreTrainedModel], dict[str, Tensor]] = lambda model: model.state_dict()
    build: Callable[[Any], PreTrainedModel] = lambda config: getattr(
        transformers, config.architectures[0]
    )(config)


def same(theirs: str, ours: str) -> Weights:
    """One tensor under another name."""
    return Weights((theirs,), (ours,), lambda x: (x,), lambda x: (x,))


def parts(
    theirs: str, ours: Sequence[str], turn: Callable[[Tensor], Tensor] = lambda x: x
) -> Weights:
    """A tensor that holds several of ours one after another, each turned by its own inverse `turn`."""
    return Weights(
        (theirs,),
        tuple(ours),
        lambda x: turn(x).chunk(len(ours)),
        lambda *x: (turn(torch.cat(x)),),
    )


def linear(theirs: str, ours: str, *, bias: bool = False) -> Iterator[Weights]:
    """A linear layer, or a norm, under another name."""
    yield same(f"{theirs}.weight", f"{ours}.weight")
    if bias:
        yield same(f"{theirs}.bias", f"{ours}.bias")


def block(index: int) -> str:
    """The place of a block of ours in a model."""
    return f"model.backbone.blocks.{index}"


def mixer(name: str, options: Mapping[str, Any], *, always: Iterable[str] = ()) -> Part:
    """A mixer with these options, without those that have their default value and are not in `always`."""
    return _part(MIXERS.get(name).Config, name, options, always)


def channel(name: str, options: Mapping[str, Any]) -> Part:
    """A channel mixer with these options, `hidden` and what has not its default value."""
    return _part(CHANNELS.get(name).Config, name, options, ("hidden",))


def _part(kind: Any, name: str, options: Mapping[str, Any], always: Iterable[str]) -> Part:
    defaults = {field: kind.__dataclass_fields__[field].default for field in options}
    kept = {k: v for k, v in options.items() if k in always or v != defaults[k]}
    return Part(name, kept)


def refuse(config: PreTrainedConfig, wanted: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises `ConfigError` for a field of `config` that is there and has none of the wanted values."""
    for field, values in wanted.items():
        found = getattr(config, field, values[0])
        if found not in values:
            shown = " or ".join(repr(value) for value in values)
            raise ConfigError(
                f"{config.model_type}: {field}={found!r} has no counterpart in the blocks of this package, wanted "
                f"{shown}. Keep this model in transformers (seqmix.accelerate may make it faster)."
            )


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation(config: PreTrainedConfig, field: str = "hidden_act") -> str:
    """Our name of the activation that the configuration names in `field`."""
    refuse(config, {field: tuple(ACTIVATIONS)})
    return ACTIVATIONS[getattr(config, field)]


def rotary(config: PreTrainedConfig, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options of attention for one entry of `rope_parameters`."""
    kind = parameters.get("rope_type", "default")
    options: dict[str, Any] = {"rope_base": float(parameters["rope_theta"])}
    if kind == "default":
        return options
    if kind == "linear":
        return options | {"rope_factor": float(parameters["factor"])}
    if kind == "llama3":
        blended = (parameters["low_freq_factor"], parameters["high_freq_factor"])
        if blended != (1.0, 4.0):
            raise ConfigError(
                f"{config.model_type}: rope_parameters with low_freq_factor, high_freq_factor = {blended}; rotary "
                "positions are blended between 1 and 4 here. Keep this model in transformers."
            )
        original = int(parameters["original_max_position_embeddings"])
        return options | {"rope_factor": float(parameters["factor"]), "rope_original": original}
    raise ConfigError(
        f"{config.model_type}: rope_parameters has rope_type={kind!r}, wanted default, linear or llama3. Keep this "
        "model in transformers."
    )
