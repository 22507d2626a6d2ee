"""Positions: rotary ones, and learned ones that are added to the embedded tokens.

Rotary: pairs of channels turn with the position, so that scores depend on distances.

    (x_i, x_{i + d/2}) turns by the angle p * f_i,   f_i = base**(-2 i / d),  i = 0 ... d/2 - 1,  position p

Su et al. 2021 (arXiv:2104.09864), eq. 34, with the halves paired as in most checkpoints. `Stretch` lowers the
frequencies f_i for texts longer than those of training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from seqmix.core.errors import RangeError, ShapeError
from seqmix.core.state import State
from seqmix.core.tree import Tree
from seqmix.kernels._native import transformed
from seqmix.ops._packing import Packing

SLOWEST, FASTEST = (
    1.0,
    4.0,
)  # turns within the original context, between which frequencies are blended
FEW = 128  # positions whose angles are kept for the next layer


@dataclass(frozen=True)
class Stretch:
    """Frequencies for longer texts: f / factor, but with `original` only where f makes few turns in so many tokens.

    A frequency with over 4 turns within the `original` context stays, one with under 1 is divided by `factor`,
    and between them the two are blended linearly in the number of turns. Without `original` all are divided.
    Chen et al. 2023 (arXiv:2306.15595), section 3.2; Llama 3 (arXiv:2407.21783), section 3.4.2.
    """

    factor: float = 1.0
    original: int | None = None

    def __call__(self, frequencies: Tensor) -> Tensor:
        if self.original is None:
            return frequencies / self.factor
        turns = self.original * frequencies / (2 * math.pi)
        kept = ((turns - SLOWEST) / (FASTEST - SLOWEST)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


def rotate(
    x: Tensor,
    positions: Tensor,
    base: float = 10000.0,
    *,
    channels: int | None = None,
    stretch: Stretch | None = None,
) -> Tensor:
    """x [B, T, H, d] turned by `positions` ([T] or [B, T], whole numbers); angles are computed in float32.

    Only the first `channels` of each head turn, all by default. Nothing is stored, so any position works and no
    table can be lost with a checkpoint. Raises `ShapeError` for an odd number of channels.
    """
    width = x.shape[-1] if channels is None else channels
    if width % 2:
        raise ShapeError(
            f"rotate: `x` has {width} channels per head, wanted an even number. Change the heads."
        )
    cos, sin = _turns(positions, base, width, stretch, x.dtype)
    turning = x if width == x.shape[-1] else x[..., :width]
    first, second = turning.chunk(2, dim=-1)
    turned = torch.addcmul(turning * cos, torch.cat([second, first], dim=-1), sin)
    return turned if turning is x else torch.cat([turned, x[..., width:]], dim=-1)


def _turns(
    positions: Tensor, base: float, width: int, stretch: Stretch | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the channels and their partners are multiplied by: cos and signed sin, both [(B,) T, 1, d]."""
    is_plain = type(positions) is Tensor and positions.is_cpu and not torch.compiler.is_compiling()
    if not is_plain or positions.numel() > FEW or transformed():
        return compute_turns(positions, base, width, stretch, dtype)
    values, shape = tuple(positions.flatten().tolist()), tuple(positions.shape)
    return turns_of_few(values, shape, base, width, stretch, dtype)


@lru_cache(maxsize=16)
def turns_of_few(
    values: tuple[int, ...],
    shape: tuple[int, ...],
    base: float,
    width: int,
    stretch: Stretch | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [*shape, 1, width] of the positions `values`, which turn `width` channels of a head.

    They are kept by value: while a model decodes, each of its layers asks for those of the same few positions.
    """
    with torch.inference_mode(False):  # what is kept must do for training too
        positions = torch.tensor(values, device="cpu").view(shape)
        return compute_turns(positions, base, width, stretch, dtype)


def compute_turns(
    positions: Tensor, base: float, width: int, stretch: Stretch | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same of `positions`, which are not kept."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    frequencies = base**-exponents
    if stretch is not None:
        frequencies = stretch(frequencies)
    angles = (positions.float().unsqueeze(-1) * frequencies).unsqueeze(-2)  # [(B,) T, 1, d/2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class LearnedPositions(nn.Module):
    """x_t + E[p_t], p_t the place of token t in its text; the state is the number of tokens read, [B].

    Radford et al. 2018 (GPT), section 3.1; Devlin et al. 2018 (arXiv:1810.04805), section 3.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(length, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def initial_state(self, batch: int, like: Tensor) -> Tensor:
        """Zeros [B]."""
        return torch.zeros(batch, dtype=torch.long, device=like.device)

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [B, T, D], or [1, total, D] with `cu_seqlens`, to the same; raises `RangeError` beyond the table."""
        if cu_seqlens is None:
            lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
            before = torch.zeros_like(lengths) if state is None else state
            places = before.unsqueeze(-1) + torch.arange(x.shape[1], device=x.device)
        else:
            lengths = Packing("LearnedPositions", cu_seqlens, x).lengths.to(x.device)
            before = torch.zeros_like(lengths) if state is None else state
            starts = lengths.cumsum(0) - lengths
            places = torch.arange(x.shape[1], device=x.device)
            places = (places + torch.repeat_interleave(before - starts, lengths)).unsqueeze(0)
        return self._add(x, places), before + lengths

    def read_tree(self, x: Tensor, state: State, tree: Tree) -> tuple[Tensor, State]:
        """x [B, n + T, D], n tokens and the nodes after them, to the same; the state is the one after the n tokens."""
        trunk = x.shape[1] - len(tree)
        before = self.initial_state(x.shape[0], x) if state is None else state
        ahead = torch.cat([torch.arange(trunk), trunk + tree.depths]).to(x.device)
        return self._add(x, before.unsqueeze(-1) + ahead), before + trunk

    def _add(self, x: Tensor, places: Tensor) -> Tensor:
        longest = int(places.max()) + 1 if places.numel() else 0
        if longest > self.table.num_embeddings:
            raise RangeError(
                f"The text has {longest} tokens, and this model has learned positions for "
                f"{self.table.num_embeddings}. Give a shorter text, or a model with rotary positions."
            )
        added: Tensor = x + self.table(places)
        return added
