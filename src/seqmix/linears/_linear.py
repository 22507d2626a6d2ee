"""What a replacement of a dense layer is, and how a model with replacements is described and rebuilt.

A model stores, for every replaced layer, the name of the file in this folder and the options that give the shapes of
its tensors; weights are then loaded into the empty replacement like any others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from seqmix.core.cost import Cost, matmul_cost
from seqmix.core.errors import ConfigError, ShapeError


def in_rows(x: Tensor, inputs: int) -> Tensor:
    """[..., I] as [1, rows, I], as the sparse products take it."""
    if x.shape[-1] != inputs:
        raise ShapeError(f"x has {x.shape[-1]} channels, wanted {inputs}, the inputs of the layer.")
    return x.reshape(1, -1, inputs)


class Replacement(nn.Module, ABC):
    """A linear layer (or an embedding) whose weight is kept in another way than as one dense matrix.

    The class stands in `seqmix.linears.NAME` as `LINEAR`.
    """

    @classmethod
    @abstractmethod
    def empty(cls, dense: Any, **options: Any) -> Self:
        """A replacement for `dense` with the shapes that `options` give and any values, on any device (meta too)."""

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Plain values from which `empty` makes the same shapes."""

    @abstractmethod
    def to_dense(self) -> nn.Module:
        """The dense layer that computes the same, up to the rounding of activations."""

    @abstractmethod
    def cost(self, length: int) -> Cost:
        """Predicted cost of `length` tokens."""

    def attach(self, model: nn.Module) -> None:
        """Called when the layer is put into its place, for layers that use another one of the model."""

    @property
    def kind(self) -> str:
        """The name of the file in this folder."""
        return type(self).__module__.rpartition(".")[2]

    def describe(self) -> dict[str, Any]:
        """What a model's specification keeps of this layer."""
        return {"kind": self.kind, **self.options}


def linear_cost(module: nn.Module, length: int) -> Cost:
    """Predicted cost of `length` tokens in one linear layer of whatever kind; nothing for other modules."""
    if isinstance(module, nn.Linear):
        return matmul_cost(length, module.in_features, module.out_features)
    return module.cost(length) if isinstance(module, Replacement) else Cost()


def replace_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Puts `layer` in the place called `path`, such as `backbone.blocks.0.mixer.query`."""
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)
    if isinstance(layer, Replacement):
        layer.attach(model)


def replace_layers(model: nn.Module, described: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts empty replacements, as `Replacement.describe` describes them, in their places."""
    from seqmix.linears import LINEARS

    for path, description in described.items():
        options = dict(description)
        kind = LINEARS.get(str(options.pop("kind", None)))
        try:
            dense = model.get_submodule(path)
        except AttributeError:
            raise ConfigError(
                f"replaced: there is no layer {path!r} in this model. Save the model again."
            ) from None
        replace_layer(model, path, kind.empty(dense, **options))
