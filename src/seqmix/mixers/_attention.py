"""What the attention mixers share, and how their key-value state is kept.

Rows of a state are aligned to the right: row b holds keys at the indices start[b] to S - 1, so that rows of
different lengths go on together by appending to all of them at once. Keys are kept after rotation by their
position in the text. With a window only the first `sinks` and the last `window - 1` keys are kept (no later
query sees another), in plain tensors, with the number of tokens `seen`; without one they grow in place.
Axes: B batch (N rows of packed texts), T new tokens, S keys, H heads, G key heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.core.state import Growing, State
from seqmix.core.tree import Tree
from seqmix.mixers._projection import ProjectionConfig, ProjectionMixer, positions_of
from seqmix.ops import Case
from seqmix.ops._packing import Packing
from seqmix.ops.attention import attention

INTEGER_BYTES = 8
WHOLE_TEXT = (  # laws of `seqmix.testing` that do not hold where a text's later tokens change its earlier outputs
    "step_equals_forward",
    "splitting_anywhere_changes_nothing",
    "gradients_flow_through_the_state",
    "a_state_is_a_value",
    "reordered_states_equal_reordered_batches",
    "texts_of_different_lengths_continue_together",
    "inference_states_can_be_continued",
)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(ProjectionConfig):
    window: int | None = None  # tokens that a token sees, itself included; all earlier ones if none
    sinks: int = 0  # first tokens of a text that stay visible beyond the window
    best: int | None = None  # keys that a query reads, of those it sees: the best ones; all if none
    scale: float | None = None  # of the scores; head_width**-0.5 if none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise ConfigError(
                f"window={self.window}, wanted at least 1, or none to see everything."
            )
        if self.best is not None and self.best < 1:
            raise ConfigError(
                f"best={self.best}, wanted at least 1, or none to read every key that is visible."
            )
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise ConfigError(
                f"sinks={self.sinks} with window={self.window}: sinks are first tokens (0 or more) that stay "
                "visible beyond a window. Give a window, or leave out sinks."
            )

    @property
    def kept(self) -> int | None:
        """How many keys later tokens may still see; None for all."""
        return None if self.window is None else self.window - 1 + self.sinks


class AttentionMixer(ProjectionMixer):
    """q, k, v = W x per head, q and k rotated; y_t = W_o sum_j softmax_j(q_t . k_j / sqrt(K)) v_j."""

    config: AttentionConfig
    operator = "attention"

    def initial_state(self, batch: int, like: Tensor) -> State:
        c = self.config
        empty = like.new_zeros(batch, 0, c.groups, c.head_width)
        count = torch.zeros(batch, dtype=torch.long, device=like.device)
        return self._state(empty, empty.clone(), count, count.clone())

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        """For texts from their first token; later ones see the keys of the state, which `read` puts before."""
        q, k, v = self.project(x)
        q, k = self.turn(q, k, positions_of(x, None, cu_seqlens))
        return {"q": q, "k": k, "v": v, **self._first_visibility()}, None

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        o, after = self.read(*self.project(x), state, cu_seqlens)
        return self.output(o.flatten(-2)), after

    def read_tree(self, x: Tensor, state: State, tree: Tree) -> tuple[Tensor, State]:
        q, k, v = self.project(x)
        trunk = x.shape[1] - len(tree)
        o, state = self.read(q[:, :trunk], k[:, :trunk], v[:, :trunk], state, None)
        branches = self._read_branches(q[:, trunk:], k[:, trunk:], v[:, trunk:], state, tree)
        o = torch.cat([o, branches], dim=1)
        return self.output(o.flatten(-2)), state

    def _read_branches(self, q: Tensor, k: Tensor, v: Tensor, state: State, tree: Tree) -> Tensor:
        """What nodes read, [B, T, H, K]: the keys of the state, and of nodes those on the path to them."""
        c, seen = self.config, self._seen(state)
        own = seen.unsqueeze(-1) + tree.depths.to(q.device)  # [B, T]
        q, k = self.turn(q, k, own)
        held, values = (
            old.tensor if isinstance(old, Growing) else old
            for old in (state["keys"], state["values"])
        )
        rank, positions = self._places(held.shape[1], state["start"], seen)
        before = self._sees(own, positions, rank) & (rank >= 0).unsqueeze(1)
        beside = self._sees(own, own, own) & tree.ancestors.to(q.device)
        return attention(
            q,
            torch.cat([held, k], dim=1),
            torch.cat([values, v], dim=1),
            causal=False,
            bias=_hiding(torch.cat([before, beside], dim=-1), q),
            best=c.best,
            scale=c.scale,
        )

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, State]:
        """What the queries read, [B, T, H, K], and the state after them; q and k have not turned yet."""
        if state is None:
            q, k = self.turn(q, k, positions_of(q, None, cu_seqlens))
            o = attention(q, k, v, **self._first_visibility(), cu_seqlens=cu_seqlens)
            return o, self._first_state(k, v, cu_seqlens)
        if cu_seqlens is None:
            return self._continue(q, k, v, state)
        return self._continue_ragged(q, k, v, state, Ragged.of(q, cu_seqlens))

    def _first_visibility(self) -> dict[str, Any]:
        """What the first tokens of a text see of each other."""
        return self._visibility()

    def _visibility(self) -> dict[str, Any]:
        c = self.config
        window = {} if c.window is None else {"window": c.window, "sinks": c.sinks}
        return {**window, "best": c.best, "scale": c.scale}

    def _first_state(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> State:
        if cu_seqlens is None:
            seen = torch.full((k.shape[0],), k.shape[1], dtype=torch.long, device=k.device)
            return self._state(k, v, torch.zeros_like(seen), seen)
        texts = Ragged.of(k, cu_seqlens)
        lengths = texts.lengths
        if self.config.kept is None:
            keys = Growing.deferred(partial(texts.unpack, k), texts.longest)
            values = Growing.deferred(partial(texts.unpack, v), texts.longest)
            return self._state(keys, values, texts.longest - lengths, lengths)
        # Padding a long text and many short ones would take the room of many long ones: forget first.
        to_the_end = lengths.index_select(0, texts.text) - texts.place
        kept = (texts.place < self.config.sinks) | (to_the_end < self.config.window)
        count = torch.bincount(texts.text[kept], minlength=len(lengths))
        texts = Ragged(count)
        k, v = (texts.unpack(x[:, kept]) for x in (k, v))
        return self._state(k, v, texts.longest - count, lengths)

    def _state(self, keys: Any, values: Any, start: Tensor, seen: Tensor) -> State:
        """The state of all keys so far (`start [B]` is where each row begins, `seen [B]` its tokens)."""
        if isinstance(keys, Growing):
            return {"keys": keys, "values": values, "start": start}
        if self.config.kept is None:
            return {"keys": Growing(keys), "values": Growing(values), "start": start}
        forgotten = keys.shape[1] - self.config.kept
        if forgotten > 0:
            shift = start.clamp_max(forgotten)
            keys, values = (self._forget(x, forgotten, shift) for x in (keys, values))
            start = start - shift
        return {"keys": keys, "values": values, "start": start, "seen": seen}

    def _forget(self, x: Tensor, forgotten: int, shift: Tensor) -> Tensor:
        """The first `sinks` of each row (which begin at `shift`) and the last `window - 1`."""
        sinks = self.config.sinks
        recent = x[:, forgotten + sinks :]
        if sinks == 0:
            return recent.clone()  # a view would keep what is forgotten in memory
        rows = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
        return torch.cat(
            [x[rows, torch.arange(sinks, device=x.device) + shift.unsqueeze(-1)], recent], dim=1
        )

    def _seen(self, state: State) -> Tensor:
        """Tokens of each row so far, [B]."""
        if self.config.kept is None:
            return state["keys"].length - state["start"]
        return state["seen"]

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """The same number of tokens for every row."""
        seen, start = self._seen(state), state["start"]
        q, k = self.turn(q, k, positions_of(q, seen))
        if self.config.kept is None:
            keys, values = state["keys"].append(k), state["values"].append(v)
            all_keys, all_values = keys.tensor, values.tensor
        else:
            keys, values = (
                torch.cat([state["keys"], k], dim=1),
                torch.cat([state["values"], v], dim=1),
            )
            all_keys, all_values = keys, values
        seen = seen + q.shape[1]
        o = self._attend(q, all_keys, all_values, start, seen)
        return o, self._state(keys, values, start, seen)

    def _continue_ragged(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, texts: Ragged
    ) -> tuple[Tensor, State]:
        """Packed texts that go on by different numbers of tokens: every row is aligned to the right again."""
        seen, start = self._seen(state), state["start"]
        positions = seen.index_select(0, texts.text) + texts.place
        q, k = self.turn(q, k, positions.unsqueeze(0))
        q, k, v = (texts.unpack(part) for part in (q, k, v))
        before = state["keys"].length if self.config.kept is None else state["keys"].shape[1]
        held = before - start
        total = held + texts.lengths
        longest = int(total.max())
        rank = torch.arange(longest, device=q.device) - (longest - total).unsqueeze(-1)  # [N, S]
        held, start, padding = (
            n.unsqueeze(-1) for n in (held, start, texts.longest - texts.lengths)
        )
        source = torch.where(rank < held, start + rank, before + padding + rank - held).clamp_min(0)
        rows = torch.arange(source.shape[0], device=q.device).unsqueeze(-1)
        keys, values = (
            torch.cat([old.tensor if isinstance(old, Growing) else old, new], dim=1)[rows, source]
            for old, new in ((state["keys"], k), (state["values"], v))
        )
        start, seen = longest - total, seen + texts.lengths
        o = self._attend(q, keys, values, start, seen)
        return texts.pack(o), self._state(keys, values, start, seen)

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, start: Tensor, seen: Tensor
    ) -> Tensor:
        """q [B, T, H, K], the last T tokens, over all keys; a bias is needed only where rows are padded."""
        if not bool(start.any()):
            return attention(q, keys, values, **self._visibility())
        c, total = self.config, keys.shape[1]
        rank, positions = self._places(total, start, seen)
        own = positions[
            :, total - q.shape[1] :
        ]  # of the last tokens, where no sink stands in for another
        visible = self._sees(own, positions, rank) & (rank >= 0).unsqueeze(1)
        return attention(q, keys, values, bias=_hiding(visible, q), best=c.best, scale=c.scale)

    def _places(self, total: int, start: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Of each of `total` keys, which one it is of its row, below 0 for none, and its position: both [B, S]."""
        index = torch.arange(total, device=start.device)
        rank = index - start.unsqueeze(-1)
        positions = seen.unsqueeze(-1) - total + index
        if self.config.window is not None:
            positions = torch.where(rank < self.config.sinks, rank, positions)
        return rank, positions

    def _sees(self, own: Tensor, positions: Tensor, rank: Tensor) -> Tensor:
        """Whether a token at `own [B, T]` may see keys at `positions [B, S]`, [B, T, S]."""
        distance = own.unsqueeze(-1) - positions.unsqueeze(1)
        visible = distance >= 0
        if self.config.window is not None:
            near = distance < self.config.window
            visible &= near | (rank < self.config.sinks).unsqueeze(1)
        return visible

    def state_bytes(self, length: int) -> int:
        c = self.config
        kept = length if c.kept is None else min(length, c.kept)
        counts = 1 if c.kept is None else 2
        return 4 * 2 * kept * c.groups * c.head_width + counts * INTEGER_BYTES

    def operator_case(self, tokens: int, context: int) -> Case:
        c = self.config
        keys = tokens + (context if c.kept is None else min(context, c.kept))
        sizes: dict[str, Any] = {"B": 1, "T": tokens, "S": keys, "H": c.heads, "G": c.groups}
        window = None if c.window is None else c.window + c.sinks
        sizes |= {"K": c.head_width, "V": c.head_width}
        return Case("mixer", sizes, {"window": window, "best": c.best})


def _hiding(visible: Tensor, like: Tensor) -> Tensor:
    """A bias [B, 1, T, S] that hides what is not visible."""
    bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill(~visible, -torch.inf).unsqueeze(1)


class Ragged:
    """Texts packed in one row [1, total], as rows [N, longest] aligned to the right, and back."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.longest = int(lengths.max())
        self.text = torch.repeat_interleave(lengths)  # [total]: which text
        total = torch.arange(len(self.text), device=lengths.device)
        start = lengths.cumsum(0) - lengths
        self.place = total - start.index_select(0, self.text)  # [total]: where in the text
        self.column = self.place + (self.longest - lengths).index_select(0, self.text)

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor) -> Ragged:
        """The texts of x [1, total, ...] between these boundaries, which are checked."""
        return cls(Packing("attention", cu_seqlens, x).lengths)

    def unpack(self, x: Tensor) -> Tensor:
        """`[1, total, ...]` to `[N, longest, ...]`, zeros before the beginning of each text."""
        rows = x.new_zeros(len(self.lengths), self.longest, *x.shape[2:])
        return rows.index_put((self.text, self.column), x[0])

    def pack(self, x: Tensor) -> Tensor:
        """`[N, longest, ...]` to `[1, total, ...]`."""
        return x[self.text, self.column].unsqueeze(0)
