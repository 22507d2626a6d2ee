"""Beam search: the likeliest texts that keeping the best few beginnings finds.

    score(y) = log p(y | x) / |y|^a

Every beginning is continued by every token; the `width` likeliest results stay. Ended texts are kept apart and
compared by score, and the search ends when no beginning can still become one of the `width` best.
The search runs in groups, which are searches of their own that take turns at every token; `diverse_beams` lets them
know of each other. Axes: N beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seqmix.generate._method import Continuation, Method, Task, at_least
from seqmix.generate._reader import Reader


@dataclass(frozen=True, kw_only=True)
class Beams(Method):
    """The likeliest texts of a search that keeps `width` of them; `length_penalty` is the a of the score."""

    width: int = 4
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        at_least("width", self.width, 1)

    def decode(self, reader: Reader, task: Task) -> list[Continuation]:
        """The `texts` best of at most `width` texts, by score."""
        (group,) = search(reader, task, [Group(self.width, self.length_penalty)], None)
        return [task.continuation(ids, total) for _, ids, total in group.best[: task.texts]]


class Group:
    """The beams of one search: beginnings that go on, and the best texts that have ended."""

    def __init__(self, width: int, length_penalty: float) -> None:
        self.width = width
        self.length_penalty = length_penalty
        self.beginnings: list[list[int]] = [[]]
        self.totals = [0.0]  # their log-probabilities
        self.best: list[tuple[float, list[int], float]] = []  # score, text, log-probability
        self.last: list[list[int]] = []  # all that the last token has made, ended or not

    def advance(self, logs: Tensor, agreement: Tensor | None, task: Task) -> list[int]:
        """Goes on by one token of log-probabilities `logs` [N, V], and returns the rows that the beams come from.

        Beams are chosen by log-probability less `agreement` [N, V], but what they carry on is the former alone.
        """
        totals = torch.tensor(self.totals, device=logs.device).unsqueeze(1) + logs
        wanted = totals if agreement is None else totals - agreement
        # As many can end as there are ends; twice the width is enough if every beam has one.
        count = min(wanted.numel(), self.width * (1 + max(1, len(task.ends))))
        values, places = wanted.flatten().topk(count)
        places = places[values > -torch.inf]
        beginnings, self.beginnings, self.totals, self.last = self.beginnings, [], [], []
        rows: list[int] = []
        for rank, place in enumerate(places.tolist()):
            row, token = divmod(place, logs.shape[1])
            ids, total = [*beginnings[row], token], float(totals[row, token])
            if task.is_finished(ids):
                if rank < self.width:
                    self.best.append((total / len(ids) ** self.length_penalty, ids, total))
                    self.last.append(ids)
            elif len(rows) < self.width:
                rows.append(row)
                self.beginnings.append(ids)
                self.totals.append(total)
                self.last.append(ids)
        self.best.sort(key=lambda text: -text[0])
        del self.best[self.width :]
        if rows and len(self.best) == self.width and self._reachable(task) <= self.best[-1][0]:
            self.beginnings, self.totals, rows = [], [], []
        return rows

    def _reachable(self, task: Task) -> float:
        """A score that no text with one of the beginnings exceeds: log-probabilities only fall."""
        lengths = (len(self.beginnings[0]) + 1, task.new_tokens)
        return max(max(self.totals) / length**self.length_penalty for length in lengths)


Agreement = Callable[[list[list[int]], list[list[int]], int], Tensor]


def search(
    reader: Reader, task: Task, groups: list[Group], agreement: Agreement | None
) -> list[Group]:
    """Runs the groups to their ends, all of them in one batch; `agreement` is what `Group.advance` subtracts.

    It is asked about the beginnings of a group and the texts of the groups before it, which are a token longer.
    """
    logits, _, state = reader.read(task.prompt)
    state = reader.select(state, [0] * len(groups))
    logits = logits[:, -1].expand(len(groups), -1)
    while True:
        written = [ids for group in groups for ids in group.beginnings]
        logs = task.allowed(logits, written).float().log_softmax(-1)
        parts = logs.split([len(group.beginnings) for group in groups])
        start, rows = 0, []
        others: list[list[int]] = []
        for group, part in zip(groups, parts, strict=True):
            if len(part):
                known = None
                if agreement is not None and others:
                    known = agreement(group.beginnings, others, part.shape[1]).to(part.device)
                rows += [start + row for row in group.advance(part, known, task)]
                start += len(part)
            others += group.last
        if not rows:
            return groups
        state = reader.select(state, rows)
        last = [[ids[-1]] for group in groups for ids in group.beginnings]
        logits, _, state = reader.read(torch.tensor(last), state)
        logits = logits[:, -1]
