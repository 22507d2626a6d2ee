"""The one backbone: blocks of a token mixer and a channel mixer, each with a norm and a residual.

    x <- x + mixer(norm(x))        x <- x + channel(norm(x))

Every model of the package is an embedding, this backbone and a head. What a block does with time is its
mixer's business alone, so states and packed texts pass through here untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.channels import CHANNELS, Channel
from seqmix.core.config import Config
from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.core.state import State
from seqmix.mixers import MIXERS, Mixer
from seqmix.models.layout import Entry, Part, parse_layout, parse_part


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Config):
    """A model as data: what is stored with its weights, and all that building it takes.

    `layout` is read by `seqmix.models.layout`; with `depth` it repeats from its start until there are so
    many blocks. `heads` goes to every mixer that has heads, unless the layout says otherwise. `channel` is
    the channel mixer of blocks that name none, or `none`.
    """

    layout: str = "attention"
    width: int = 128
    depth: int | None = None
    heads: int = 4
    channel: str = "glu"
    vocabulary: int = 258
    tied: bool = True  # the output head shares the embedding's weights

    def __post_init__(self) -> None:
        for name in ("width", "heads", "vocabulary"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}, wanted at least 1.")
        if self.depth is not None and self.depth < 1:
            raise ConfigError(
                f"depth={self.depth}, wanted at least 1, or none for the layout as written."
            )

    def entries(self) -> list[Entry]:
        """One entry per block."""
        written = parse_layout(self.layout)
        depth = self.depth or len(written)
        return [written[i % len(written)] for i in range(depth)]


def build_mixer(part: Part, spec: ModelSpec) -> Mixer:
    """The mixer that a layout entry names, at the width of the specification."""
    mixer = MIXERS.get(part.name)
    options: dict[str, Any] = {"width": spec.width}
    if "heads" in mixer.Config.fields():
        options["heads"] = spec.heads
    return mixer(mixer.Config.from_dict(options | dict(part.options), owner=part.name))


def build_channel(part: Part, spec: ModelSpec) -> Channel | None:
    """The channel mixer that a layout entry names; None for `none`."""
    if part.name == "none":
        return None
    channel = CHANNELS.get(part.name)
    options = {"width": spec.width} | dict(part.options)
    return channel(channel.Config.from_dict(options, owner=part.name))


class Block(nn.Module):
    """One token mixer and, unless it is `none`, one channel mixer."""

    def __init__(self, mixer: Mixer, channel: Channel | None, width: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(width, eps=1e-6)
        self.mixer = mixer
        self.channel_norm = None if channel is None else nn.RMSNorm(width, eps=1e-6)
        self.channel = channel

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        y, state = self.mixer(self.mixer_norm(x), state, cu_seqlens=cu_seqlens)
        x = x + y
        if self.channel is not None and self.channel_norm is not None:
            x = x + self.channel(self.channel_norm(x))
        return x, state

    def cost(self, length: int, *, context: int = 0) -> Cost:
        """Predicted cost of `length` tokens after `context` earlier ones."""
        cost = self.mixer.cost(length, context=context)
        return cost if self.channel is None else cost + self.channel.cost(length)


class Backbone(nn.Module):
    """Embedded tokens [B, T, D] to features [B, T, D], through every block and a last norm.

    With `gradient_checkpointing`, which transformers sets together with the function that does it, training
    keeps only what goes into a block and computes the rest again.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., tuple[Tensor, State]]

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        default = parse_part(spec.channel)
        self.blocks = nn.ModuleList(
            Block(
                build_mixer(entry.mixer, spec),
                build_channel(entry.channel or default, spec),
                spec.width,
            )
            for entry in spec.entries()
        )
        self.norm = nn.RMSNorm(spec.width, eps=1e-6)
        self.initialise()

    def initialise(self) -> None:
        """Linear weights are normal with deviation fan_in**-0.5; those that write to the residual stream
        (modules called `output`) are smaller by sqrt(2 * depth), so that its size does not grow with depth.
        A module with `keeps_initialisation` has set its own weights; biases start at zero.
        """
        shrink = 1 / math.sqrt(2 * len(self.blocks))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not getattr(module, "keeps_initialisation", False):
                deviation = module.in_features**-0.5
                deviation *= shrink if name.endswith(".output") else 1.0
                nn.init.normal_(module.weight, std=deviation)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [B, T, D] (or [1, total, D] with `cu_seqlens`) and a state per block, to features and states."""
        states = [None] * len(self.blocks) if state is None else state
        after = []
        for block, before in zip(self.blocks, states, strict=True):
            run = partial(block, cu_seqlens=cu_seqlens)
            if self.gradient_checkpointing and self.training:
                x, new = self._gradient_checkpointing_func(run, x, before)
            else:
                x, new = run(x, before)
            after.append(new)
        return self.norm(x), after

    def initial_state(self, batch: int, like: Tensor) -> State:
        """The state before the first token."""
        return [block.mixer.initial_state(batch, like) for block in self.blocks]

    def state_bytes(self, length: int) -> int:
        """Bytes of state per text after `length` tokens, in float32."""
        return sum(block.mixer.state_bytes(length) for block in self.blocks)

    def cost(self, length: int, *, context: int = 0) -> Cost:
        """Predicted cost of `length` tokens after `context` earlier ones, for one text in float32."""
        return sum((b.cost(length, context=context) for b in self.blocks), Cost())


class LanguageModel(nn.Module):
    """Token ids [B, T] to logits [B, T, vocabulary]: embedding, backbone, (tied) head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.backbone = Backbone(spec)
        self.head = nn.Linear(spec.width, spec.vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if spec.tied:
            self.head.weight = self.embedding.weight

    def forward(
        self, ids: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """ids [B, T] (or [1, total] with `cu_seqlens`) to logits and the state after the last token."""
        features, state = self.backbone(self.embedding(ids), state, cu_seqlens=cu_seqlens)
        return self.head(features), state

    def initial_state(self, batch: int, like: Tensor | None = None) -> State:
        """The state of `batch` texts before their first token."""
        return self.backbone.initial_state(batch, self.embedding.weight if like is None else like)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def cost(self, length: int, *, context: int = 0) -> Cost:
        """Predicted cost of `length` tokens after `context` earlier ones, for one text in float32."""
        head = 2.0 * length * self.spec.width * self.spec.vocabulary
        moved = 4.0 * (self.head.weight.numel() + length * self.spec.vocabulary)
        return self.backbone.cost(length, context=context) + Cost(flops=head, bytes=moved)


@torch.no_grad()
def count_parameters(spec: ModelSpec) -> int:
    """Parameters of the model that `spec` describes, without allocating it."""
    with torch.device("meta"):
        return LanguageModel(spec).num_parameters()
