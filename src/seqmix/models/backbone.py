"""The one backbone: blocks of a token mixer and a channel mixer, each with a norm and a residual.

    x <- x + mixer(norm(x))        x <- x + channel(norm(x))        or another order of norms, see `Block`

Every model of the package is an embedding, this backbone and a head. What a block does with time is its
mixer's business alone, so states and packed texts pass through here untouched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.channels import CHANNELS, Channel
from seqmix.core.config import Config
from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.core.state import State
from seqmix.core.tree import Tree
from seqmix.layers.norm import NORMS
from seqmix.layers.positions import LearnedPositions
from seqmix.linears import linear_cost, replace_layers
from seqmix.mixers import MIXERS, Mixer
from seqmix.models._decoding import blocks_step, channel_step, head_step, mixer_step
from seqmix.models._halves import KnownBlocks
from seqmix.models.layout import Entry, Part, parse_layout, parse_part, write_layout

RESIDUALS = ("pre", "parallel", "sandwich", "post")
HEADS = ("linear", "transformed")


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Config):
    """A model as data: what is stored with its weights, and all that building it takes.

    `layout` is read by `seqmix.models.layout`; with `depth` it repeats from its start until there are so
    many blocks. `heads` goes to every mixer that has heads, unless the layout says otherwise. `channel` is
    the channel mixer of blocks that name none, or `none`. `Block` says what `residual` and `shortcuts` do.
    """

    layout: str = "attention"
    width: int = 128
    depth: int | None = None
    heads: int = 4
    channel: str = "glu"
    vocabulary: int = 258
    tied: bool = True  # the output head shares the embedding's weights
    head: str = "linear"  # or "transformed", with a layer before it and a bias
    norm: str = "rms"  # or "layer", "progressive_batch", "affine", "none"
    last_norm: str | None = None  # the one before the head, where it is another
    norm_eps: float = 1e-6
    residual: str = "pre"
    shortcuts: bool = False  # the residual stream passes a matrix around every mixer
    positions: int | None = None  # learned positions, for texts of so many tokens; none without
    embedding_scale: float = 1.0
    embedding_norm: bool = False  # a norm before the first block
    replaced: Mapping[str, Any] = field(
        default_factory=dict
    )  # layers that `seqmix.linears` has replaced

    def __post_init__(self) -> None:
        for name in ("width", "heads", "vocabulary"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}, wanted at least 1.")
        for name in ("depth", "positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}, wanted at least 1, or none.")
        choices = {
            "norm": tuple(NORMS),
            "last_norm": (None, *NORMS),
            "residual": RESIDUALS,
            "head": HEADS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}, wanted one of {', '.join(map(str, known))}."
                )
        if self.shortcuts and self.residual != "pre":
            raise ConfigError(
                f"shortcuts=true goes with residual='pre', not with {self.residual!r}."
            )

    def entries(self) -> list[Entry]:
        """One entry per block."""
        written = parse_layout(self.layout)
        depth = self.depth or len(written)
        return [written[i % len(written)] for i in range(depth)]

    def with_entries(self, entries: Sequence[Entry]) -> ModelSpec:
        """The same model with other blocks."""
        return dataclasses.replace(self, layout=write_layout(entries), depth=None)


def build_norm(spec: ModelSpec) -> nn.Module:
    """A norm over the width of the specification."""
    return NORMS[spec.norm](spec.width, eps=spec.norm_eps)


def build_mixer(part: Part, spec: ModelSpec) -> Mixer | None:
    """The mixer that a layout entry names, at the width of the specification; None for `none`."""
    if part.name == "none":
        return None
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
    """One token mixer and one channel mixer, either of which may be missing (`none`).

        pre       x <- x + mixer(norm(x));           x <- x + channel(norm(x))
        parallel  x <- x + mixer(norm(x)) + channel(norm'(x))
        sandwich  x <- x + norm'(mixer(norm(x)));    x <- x + norm'(channel(norm(x)))
        post      x <- norm(x + mixer(x));           x <- norm(x + channel(x))

    With `shortcuts`, x + ... becomes S x + ... with a matrix S of its own for every mixer, which is how
    a residual stream is turned or narrowed between them (Ashkboos et al. 2024, arXiv:2401.15024, section 3.2).
    """

    def __init__(self, mixer: Mixer | None, channel: Channel | None, spec: ModelSpec) -> None:
        super().__init__()
        self.residual = spec.residual
        for name, part in (("mixer", mixer), ("channel", channel)):
            present, sandwich = part is not None, spec.residual == "sandwich"
            setattr(self, f"{name}_norm", build_norm(spec) if present else None)
            setattr(self, name, part)
            setattr(self, f"{name}_last_norm", build_norm(spec) if present and sandwich else None)
            shortcut = None
            if present and spec.shortcuts:
                shortcut = nn.Linear(spec.width, spec.width, bias=False)
                shortcut.keeps_initialisation = True
                nn.init.eye_(shortcut.weight)
            setattr(self, f"{name}_shortcut", shortcut)

    def forward(
        self,
        x: Tensor,
        state: State = None,
        *,
        cu_seqlens: Tensor | None = None,
        tree: Tree | None = None,
    ) -> tuple[Tensor, State]:
        given = x
        step = mixer_step(self, x, state, cu_seqlens) if tree is None else None
        if step is not None:
            x, state = step
        elif self.mixer is not None:
            y = x if self.residual == "post" else self.mixer_norm(x)
            if tree is None:
                y, state = self.mixer(y, state, cu_seqlens=cu_seqlens)
            else:
                y, state = self.mixer.read_tree(y, state, tree)
            x = self._add("mixer", x, y)
        if (y := channel_step(self, x)) is not None:
            return y, state
        if self.channel is not None:
            y = given if self.residual == "parallel" else x
            y = self.channel(y if self.residual == "post" else self.channel_norm(y))
            x = self._add("channel", x, y)
        return x, state

    def _add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x + y, in the way of `residual`."""
        shortcut, last = getattr(self, f"{name}_shortcut"), getattr(self, f"{name}_last_norm")
        x = (x if shortcut is None else shortcut(x)) + (y if last is None else last(y))
        return getattr(self, f"{name}_norm")(x) if self.residual == "post" else x

    def cost(self, length: int, *, context: int = 0) -> Cost:
        """Predicted cost of `length` tokens after `context` earlier ones."""
        cost = Cost() if self.mixer is None else self.mixer.cost(length, context=context)
        for shortcut in (self.mixer_shortcut, self.channel_shortcut):
            if shortcut is not None:
                cost += linear_cost(shortcut, length)
        return cost if self.channel is None else cost + self.channel.cost(length)


def _is_block(given: tuple[nn.Module, State]) -> bool:
    """Whether it computes what `Block` does: somebody may have put another module in its place."""
    return type(given[0]) is Block


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
                spec,
            )
            for entry in spec.entries()
        )
        self.scale = spec.embedding_scale
        self.positions = (
            None if spec.positions is None else LearnedPositions(spec.positions, spec.width)
        )
        self.embedding_norm = build_norm(spec) if spec.embedding_norm else None
        last = dataclasses.replace(spec, norm=spec.last_norm or spec.norm)
        self.norm = None if spec.residual == "post" else build_norm(last)  # post has normed already
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
        self,
        x: Tensor,
        state: State = None,
        *,
        cu_seqlens: Tensor | None = None,
        tree: Tree | None = None,
        known: KnownBlocks | None = None,
    ) -> tuple[Tensor, State]:
        """x [B, T, D] (or [1, total, D] with `cu_seqlens`) and the state, to features and the state after x.

        A state is a list with an entry per block, after one for learned positions where there are any. With a tree, the
        last tokens are its nodes and the state is the one before them, as in `Mixer.read_tree`. Who decodes with
        `known` promises what it asks for.
        """
        states = list(state or [None] * (len(self.blocks) + (self.positions is not None)))
        place = None if self.positions is None else states.pop(0)
        x, place = self.enter(x, place, cu_seqlens=cu_seqlens, tree=tree)
        left, after = list(zip(self.blocks, states, strict=True)), []
        while left:
            few = None
            if tree is None:
                few = blocks_step(takewhile(_is_block, left), x, known, cu_seqlens)
            if few is None:
                x, state = self._through(*left[0], x, cu_seqlens=cu_seqlens, tree=tree)
                new = [state]
            else:
                x, new = few
            after += new
            del left[: len(new)]
        return self.leave(x), after if self.positions is None else [place, *after]

    def _through(
        self, block: nn.Module, state: State, x: Tensor, **others: Any
    ) -> tuple[Tensor, State]:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(block, **others), x, state)
        return block(x, state, **others)

    def enter(
        self,
        x: Tensor,
        state: State = None,
        *,
        cu_seqlens: Tensor | None = None,
        tree: Tree | None = None,
    ) -> tuple[Tensor, State]:
        """What the first block reads, of embedded tokens; the state is that of learned positions, if there are any."""
        if self.scale != 1.0:
            x = x * self.scale
        if self.positions is not None and tree is None:
            x, state = self.positions(x, state, cu_seqlens=cu_seqlens)
        elif self.positions is not None:
            x, state = self.positions.read_tree(x, state, tree)
        return x if self.embedding_norm is None else self.embedding_norm(x), state

    def leave(self, x: Tensor) -> Tensor:
        """Features, of what the last block wrote."""
        return x if self.norm is None else self.norm(x)

    def initial_state(self, batch: int, like: Tensor) -> State:
        """The state before the first token."""
        first = [] if self.positions is None else [self.positions.initial_state(batch, like)]
        mixers = [block.mixer for block in self.blocks]
        return first + [None if m is None else m.initial_state(batch, like) for m in mixers]

    def state_bytes(self, length: int) -> int:
        """Bytes of state per text after `length` tokens, in float32."""
        counter = 0 if self.positions is None else 8
        mixers = [block.mixer for block in self.blocks if block.mixer is not None]
        return counter + sum(mixer.state_bytes(length) for mixer in mixers)

    def cost(self, length: int, *, context: int = 0) -> Cost:
        """Predicted cost of `length` tokens after `context` earlier ones, for one text in float32."""
        return sum((b.cost(length, context=context) for b in self.blocks), Cost())


class HeadTransform(nn.Module):
    """norm(gelu(W x + b)), between the features and the head of BERT's masked language model."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.dense = nn.Linear(spec.width, spec.width)
        self.norm = build_norm(spec)
        nn.init.normal_(self.dense.weight, std=spec.width**-0.5)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))


class LanguageModel(nn.Module):
    """Token ids [B, T] to logits [B, T, vocabulary]: embedding, backbone, (tied) head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.backbone = Backbone(spec)
        transformed = spec.head == "transformed"
        self.transform = HeadTransform(spec) if transformed else None
        self.head = nn.Linear(spec.width, spec.vocabulary, bias=transformed)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if transformed:
            nn.init.zeros_(self.head.bias)
        if spec.tied:
            self.head.weight = self.embedding.weight
        replace_layers(self, spec.replaced)

    def forward(
        self, ids: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """ids [B, T] (or [1, total] with `cu_seqlens`) to logits and the state after the last token."""
        features, state = self.backbone(self.embedding(ids), state, cu_seqlens=cu_seqlens)
        return self.logits(features), state

    def logits(self, features: Tensor) -> Tensor:
        """[..., vocabulary] of features [..., D]."""
        if self.transform is not None:
            features = self.transform(features)
        few = head_step(self.head, features)
        return self.head(features) if few is None else few

    def initial_state(self, batch: int, like: Tensor | None = None) -> State:
        """The state of `batch` texts before their first token."""
        return self.backbone.initial_state(batch, next(self.parameters()) if like is None else like)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def cost(self, length: int, *, context: int = 0) -> Cost:
        """Predicted cost of `length` tokens after `context` earlier ones, for one text in float32."""
        cost = self.backbone.cost(length, context=context) + linear_cost(self.head, length)
        transform = self.transform
        return cost if transform is None else cost + linear_cost(transform.dense, length)


@torch.no_grad()
def count_parameters(spec: ModelSpec) -> int:
    """Parameters of the model that `spec` describes, without allocating it."""
    with torch.device("meta"):
        return LanguageModel(spec).num_parameters()
