"""Diverse beam search: groups of beams, each of which avoids what the groups before it do.

    group g takes the best of   log p(y | x) - strength * agreement(y, texts of groups 1 .. g-1)

Groups take turns at every token, so a search is greedy over groups. Two agreements of section 3 of the paper:
`hamming` counts the others' texts with the same token at the same place, `ngrams(n)` how often they have the n-gram
that the token completes. With one group it is beam search. Scores that are carried on and compared in the end are
log-probabilities alone. Vijayakumar et al. 2016 (arXiv:1610.02424), algorithm 1.

Axes: N beams, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqmix.generate._method import Continuation, Method, Task, at_least
from seqmix.generate._reader import Reader
from seqmix.generate.beams import Agreement, Group, search


def hamming(beginnings: list[list[int]], others: list[list[int]], vocabulary: int) -> Tensor:
    """How many of `others` have each token [N, V] at the place that follows each of the `beginnings`."""
    place = len(beginnings[0])
    tokens = torch.tensor([ids[place] for ids in others if len(ids) > place], dtype=torch.long)
    counts = torch.bincount(tokens, minlength=vocabulary).float()
    return counts.expand(len(beginnings), vocabulary)


def ngrams(length: int) -> Agreement:
    """The agreement that counts, over all `others`, the n-grams of `length` that each token would complete."""
    at_least("length", length, 1)

    def agreement(beginnings: list[list[int]], others: list[list[int]], vocabulary: int) -> Tensor:
        counts = torch.zeros(len(beginnings), vocabulary)
        for row, ids in enumerate(beginnings):
            context = ids[len(ids) - length + 1 :] if length > 1 else []
            if len(context) < length - 1:
                continue
            for other in others:
                for end in range(length - 1, len(other)):
                    if other[end - length + 1 : end] == context:
                        counts[row, other[end]] += 1
        return counts

    return agreement


@dataclass(frozen=True, kw_only=True)
class DiverseBeams(Method):
    """`groups` searches of `width` beams each, of which every one avoids those before it by `strength`."""

    groups: int = 4
    width: int = 1
    strength: float = 0.5
    agreement: Agreement = hamming
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        at_least("groups", self.groups, 1)
        at_least("width", self.width, 1)
        at_least("strength", self.strength, 0)

    def decode(self, reader: Reader, task: Task) -> list[Continuation]:
        """The best text of every group in order, then the second best, and so on; `texts` of them."""

        def weighted(own: list[list[int]], others: list[list[int]], vocabulary: int) -> Tensor:
            return self.strength * self.agreement(own, others, vocabulary)

        groups = [Group(self.width, self.length_penalty) for _ in range(self.groups)]
        found = [group.best for group in search(reader, task, groups, weighted)]
        texts = [texts[rank] for rank in range(self.width) for texts in found if rank < len(texts)]
        return [task.continuation(ids, total) for _, ids, total in texts[: task.texts]]
