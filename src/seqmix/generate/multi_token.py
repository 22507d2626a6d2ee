"""Guesses that cost no reading of their own: masks stand behind every guess that is being checked.

    read at once   x g_1 ... g_C,   x m_1 ... m_K,   x g_1 m_1 ... m_K,   ...,   x g_1 ... g_C m_1 ... m_K

The first text checks the guesses; whichever of them turn out right, masks have been read behind just these, and say
what may come next. So every reading both checks and guesses anew (quadratic decoding). Each is a text of its own,
packed with the others, so masks enter no state, and recurrent and hybrid models decode as attention does.
Samragh et al. 2025 (arXiv:2507.11851), section 2.4; there one text holds all, by an attention mask that hides masks.

Axes: T time, N texts, K masks, D width, V vocabulary.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from seqmix.core.errors import ShapeError
from seqmix.core.state import State, select_rows
from seqmix.generate._method import Task
from seqmix.generate._reader import Reader, Reading
from seqmix.generate.sampling import Sampling, draw
from seqmix.generate.speculative import Draft, Drafter, Guess
from seqmix.models.multi_token import MultiTokenModel


class _After(NamedTuple):
    """The model's state after so many tokens."""

    state: State
    tokens: int


class MultiTokenReader(Reader, Drafter):
    """Reads as the frozen model does, and is the drafter of what it reads: `Speculative(drafter=reader)` with it.

    One text at a time, and no more guesses than `model` has masks.
    """

    def __init__(self, model: MultiTokenModel) -> None:
        self.model = model.eval()
        self.ahead: dict[int, Tensor] = {}  # features [K, D] of the masks behind so many tokens

    def read(self, ids: Tensor, state: State = None, *, keep: int = 1) -> Reading:
        """As `Reader.read`, for one row, with masks behind each of the last `keep` tokens."""
        if ids.shape[0] != 1:
            raise ShapeError(f"multi-token: `ids` has {ids.shape[0]} rows, wanted 1.")
        before, done = _After(None, 0) if state is None else state
        count = ids.shape[1]
        ends = self.places(count, keep or count)
        lengths = [count] + [end + len(self.model.masks) for end in ends]
        base = self.model.base.model
        tokens = base.embedding(ids.to(base.embedding.weight.device))[0]
        x = torch.cat([tokens] + [p for n in ends for p in (tokens[:n], self.model.masks)])
        gate = torch.cat([torch.arange(n) >= n - len(self.model.masks) for n in lengths])
        gate[:count] = False
        features, after = self.model.read(
            x[None],
            None if before is None else select_rows(before, [0] * len(lengths)),
            gate.to(x)[None, :, None],
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=x.device),
        )
        _, *behind = features[0].split(lengths)
        masks = len(self.model.masks)
        self.ahead = {done + n: z[-masks:] for n, z in zip(ends, behind, strict=True)}
        read = features[:, :count]
        return Reading(
            base.logits(read[:, -keep:]), read, _After(select_rows(after, [0]), done + count)
        )

    def places(self, count: int, keep: int) -> range:
        """After how many of `count` tokens masks are read, if the last `keep` are to be known."""
        return range(count - keep + 1, count + 1)

    def logits(self, features: Tensor, before: Tensor) -> Tensor:
        """Logits [N, V] at masks of features [N, D] behind the tokens `before` [N]."""
        return self.model.logits(features, before)

    def select(self, state: State, rows: list[int]) -> State:
        return state._replace(state=select_rows(state.state, rows))

    def start(self, task: Task) -> Draft:
        self.ahead = {}
        return _MaskDraft(self, task)


class _MaskDraft(Draft):
    def __init__(self, reader: MultiTokenReader, task: Task) -> None:
        self.reader, self.task = reader, task
        self.prompt = task.prompt[0].tolist()

    def guess(
        self, written: list[int], count: int, sampling: Sampling, source: torch.Generator
    ) -> list[Guess]:
        text, ahead = self.prompt + written, list(written)
        guesses: list[Guess] = []
        # The masks stand before the last token, which was drawn since.
        for z in self.reader.ahead.get(len(text) - 1, torch.empty(0))[:count]:
            before = torch.tensor([guesses[-1].token if guesses else text[-1]], device=z.device)
            last = self.task.allowed(self.reader.logits(z[None], before), [ahead])
            chances = sampling.probabilities(last, self.prompt, [ahead])[0]
            guesses.append(Guess(draw(chances, source), chances))
            ahead.append(guesses[-1].token)
            if self.task.is_finished(ahead):
                break
        return guesses
