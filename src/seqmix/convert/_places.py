"""Where in a modelling module our operators go in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from seqmix.convert._functions import REPLACEMENTS, Function, Replacement
from seqmix.convert._inline import lightning_attention, rwkv_linear_attention
from seqmix.convert._steps import (
    causal_conv1d_update,
    mamba2_selective_state_update,
    mamba_selective_state_update,
)
from seqmix.convert._texts import hand_on, remember

_RWKV = Replacement(
    "diagonal_scan", rwkv_linear_attention, ("time_decay", "time_first", "key", "value", "state")
)
_UPDATE = ("state", "hidden_states", "dt", "A", "B", "C", "D")
FUNCTIONS: Mapping[str, Replacement] = {
    **REPLACEMENTS,
    "causal_conv1d_update": Replacement(
        "short_convolution",
        causal_conv1d_update,
        ("hidden_states", "conv_state", "weight", "bias", "activation"),
    ),
    "mamba_selective_state_update": Replacement(
        "selective_scan", mamba_selective_state_update, _UPDATE
    ),
    "mamba2_selective_state_update": Replacement(
        "state_space_dual", mamba2_selective_state_update, _UPDATE
    ),
    "rwkv_linear_attention": _RWKV,
}
FORWARDS: Mapping[str, Replacement] = {  # class -> its forward
    "MiniMaxLightningAttention": Replacement(
        "linear_attention",
        lightning_attention,
        ("self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values"),
    )
}


@dataclass(frozen=True)
class Place:
    """An attribute of a module or class, and what makes its replacement from what stands there."""

    owner: Any
    name: str
    make: Callable[[Function], Function]
    operator: str = ""  # none for what only helps the others

    @property
    def label(self) -> str:
        return self.name if inspect.ismodule(self.owner) else f"{self.owner.__name__}.{self.name}"


def places(module: ModuleType) -> Iterator[Place]:
    """The places of a modelling module whose functions are the known ones, with the parameters that we know."""
    known, around, blocks = set(), list[Place](), list[Place]()
    for name, replacement in FUNCTIONS.items():
        if _is_known(vars(module).get(name), replacement):
            known.add(name)
            yield Place(module, name, replacement.make, replacement.operator)
    for layer in _layers(module):
        whole = FORWARDS.get(layer.__name__)
        if whole is not None and _is_known(layer.forward, whole):
            known.add(layer.__name__)
            yield Place(layer, "forward", whole.make, whole.operator)
        elif issubclass(layer, GradientCheckpointingLayer):
            # It asks whether its own forward is the outermost one, so that must stay.
            blocks.append(Place(layer, "__call__", hand_on))
        elif issubclass(layer, PreTrainedModel) or known & set(called_names(layer)):
            around.append(Place(layer, "forward", remember))
    if known:
        yield from (*around, *blocks)


def _layers(module: ModuleType) -> list[type[nn.Module]]:
    """The layers written in the module that have a forward of their own."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__ == module.__name__
        and "forward" in vars(value)
    ]


def called_names(layer: type[nn.Module]) -> tuple[str, ...]:
    """The names that the forward of a layer's class uses, in the order of its code."""
    code = getattr(inspect.unwrap(layer.forward), "__code__", None)
    return () if code is None else code.co_names


def _is_known(function: Any, replacement: Replacement) -> bool:
    if not callable(function):
        return False
    parameters = tuple(inspect.signature(function).parameters)
    return parameters[: len(replacement.parameters)] == replacement.parameters
