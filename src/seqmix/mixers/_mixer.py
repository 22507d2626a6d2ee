"""What a token mixer is: x [B, T, D] to y [B, T, D], carrying a state from left to right."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqmix.core.config import Config
from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.core.state import State, fork, num_bytes
from seqmix.core.tree import Tree
from seqmix.linears import linear_cost
from seqmix.ops import OPERATORS, Case


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Config):
    """Fields that every mixer has; subclasses add theirs, and every field must change something."""

    width: int = 64


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(MixerConfig):
    """A mixer with heads; `width` must be a multiple of `heads`."""

    heads: int = 4

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ConfigError(
                f"width={self.width} must be a multiple of heads={self.heads}. "
                "Change one of them, e.g. give heads=... in the layout."
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Mixer(nn.Module, ABC):
    """A token mixer: projections around one operator.

    `operator` names the operator in the middle and `operands` gives its arguments, from which the mixing
    matrix and the cost are derived. `exceptions` maps the name of a law of `seqmix.testing` that this mixer
    does not keep to the reason; it is tested as a strict expected failure. `examples` names further
    configurations in which the laws are tested.
    """

    Config: ClassVar[type[MixerConfig]] = MixerConfig
    config: Any  # an instance of `Config`
    operator: str | None = None  # of the class, or of an instance where its configuration decides
    causal: ClassVar[bool] = True
    reads_prefix: ClassVar[bool] = (
        False  # not causal in a first call, but causal when it goes on from one
    )
    exceptions: ClassVar[Mapping[str, str]] = {}
    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [B, T, D] and the state after the tokens before them, to y [B, T, D] and the state after them.

        With `cu_seqlens [N+1]`, x is [1, total, D], N texts end to end, and states have N rows. State None
        stands for `initial_state`.
        """

    @abstractmethod
    def initial_state(self, batch: int, like: Tensor) -> State:
        """The state of `batch` texts before their first token, on the device of `like`."""

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, D] to y [B, D]. Override only for speed; a law compares it with `forward`."""
        y, state = self(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def read_tree(self, x: Tensor, state: State, tree: Tree) -> tuple[Tensor, State]:
        """Tokens that go on in several ways: x [B, n + T, D], n >= 1 tokens and then the nodes of the tree.

        Gives y [B, n + T, D], where every node has read the tokens and the nodes on the path to it, and the state after
        the n tokens. In general every path is read as a text of its own, from copies of that state. Override where one
        pass over the nodes can do it; a law compares it with `forward`.
        """
        trunk, nodes = x.tensor_split([x.shape[1] - len(tree)], dim=1)
        y, state = self(trunk, state)
        paths = tree.paths.to(x.device)
        branches, _ = self(nodes[:, paths].flatten(0, 1), fork(state, len(paths)))
        branches = branches.unflatten(0, (-1, len(paths)))[:, tree.rows, tree.depths]
        return torch.cat([y, branches], dim=1), state

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        """The operator's arguments for x, and the state of what comes before it (short convolutions)."""
        raise ConfigError(f"{type(self).__name__} has no single operator, so no mixing matrix.")

    def matrix(self, x: Tensor) -> Tensor:
        """The mixing matrix M [B, H, T, T]: the operator gives o[t] = sum_s M[t, s] value[s], per head.

        Derived by passing the identity as the operator's value argument.
        """
        arguments, _ = self.operands(x)
        return mixing_matrix(self.operator or "", arguments)

    def operator_case(self, tokens: int, context: int) -> Case | None:
        """The operator's sizes for `tokens` new tokens after `context` earlier ones, batch 1."""
        return None

    def cost(self, length: int, *, context: int = 0) -> Cost:
        """Predicted cost of `length` tokens after `context` earlier ones, for one text in float32.

        Every linear layer counts as a matrix product, the operator by its own cost model.
        """
        total = Cost(state_bytes=self.state_bytes(context + length))
        for module in self.modules():
            total += linear_cost(module, length)
        if self.operator and (case := self.operator_case(length, context)):
            inner = OPERATORS.get(self.operator).cost(case)
            total += Cost(flops=inner.flops, bytes=inner.bytes)
        return total

    def state_bytes(self, length: int) -> int:
        """Bytes of state per text after `length` tokens, in float32; constant unless overridden."""
        return num_bytes(self.initial_state(1, torch.empty(0)))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())


def mixing_matrix(operator: str, arguments: dict[str, Any]) -> Tensor:
    """M [B, H, T, T] of an operator that is linear in its value argument, for given operands.

    The value is [B, T, H, V], where the identity fills its columns, or [B, T, D], where every channel is a
    head and the operator runs on one row per token of the identity.
    """
    description = OPERATORS.get(operator)
    if description.value is None:
        raise ConfigError(f"{operator} has no value argument, so no mixing matrix.")
    value = arguments[description.value]
    batch, length, heads = value.shape[:3]
    identity = torch.eye(length, dtype=value.dtype, device=value.device)
    if value.ndim == 3:
        unit = identity[None, :, :, None].expand(batch, -1, -1, heads).flatten(0, 1)
        arguments = {
            name: x.repeat_interleave(length, dim=0)
            if isinstance(x, Tensor) and description.axes[name][0].startswith("B")
            else x
            for name, x in arguments.items()
        }
    else:
        unit = identity[None, :, None].expand(batch, length, heads, length)
    module = importlib.import_module(f"seqmix.ops.{operator}")
    result = getattr(module, operator)(**{**arguments, description.value: unit})
    out = result[0] if isinstance(result, tuple) else result
    if value.ndim == 3:
        return out.unflatten(0, (batch, length)).permute(0, 3, 2, 1)  # [B, D, T, T]
    return out.permute(0, 2, 1, 3)  # [B, H, T, T]


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters (decays, steps, skips) that weight decay would wreck: every module lists its
    own in `no_weight_decay`. They also stay in float32 where a model is kept in half precision.
    """
    return {
        f"{place}.{name}" if place else name
        for place, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", ())
    }
