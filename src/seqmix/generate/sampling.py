"""Sampling, and the likeliest token: one distribution over the next token, and a draw from it.

    p(v) ~ exp(l'_v / temperature)  over the tokens that top-k, top-p and min-p leave, in this order

    l'_v = l_v / r if l_v > 0, else l_v r     for a token v of prompt or text (Keskar et al. 2019, arXiv:1909.05858)
         - presence [c_v > 0] - frequency c_v  for a token that the new text has c_v times
         + bias_v

top-k keeps the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833), top-p the likeliest that together reach p
(Holtzman et al. 2019, arXiv:1904.09751), min-p those with at least so much of the likeliest one's probability (Nguyen
et al. 2024, arXiv:2407.01082). Axes: N texts, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seqmix.core.errors import DataError
from seqmix.generate._method import Continuation, Method, Task, at_least, within
from seqmix.generate._reader import Reader


@dataclass(frozen=True, kw_only=True)
class Sampling(Method):
    """Draws every token from the model's distribution, or with temperature 0 takes the likeliest.

    Each text has its own random numbers, those of `seed` and its place: the others of the batch change nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least("temperature", self.temperature, 0)
        if self.top_k is not None:
            at_least("top_k", self.top_k, 1)
        within("top_p", self.top_p, 1e-9, 1)
        within("min_p", self.min_p, 0, 1)
        at_least("repetition_penalty", self.repetition_penalty, 1e-9)
        within("presence_penalty", self.presence_penalty, -2, 2)
        within("frequency_penalty", self.frequency_penalty, -2, 2)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token of the logits as they are is wanted."""
        return self.temperature == 0 and not self._changes_logits

    @property
    def _changes_logits(self) -> bool:
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1, 0, 0) or bool(self.bias)

    def probabilities(self, logits: Tensor, prompt: list[int], written: list[list[int]]) -> Tensor:
        """What the next token is drawn from [N, V], for the logits [N, V] after `prompt` and `written` [N]."""
        logits = self._penalised(logits.float(), prompt, written)
        if not bool((logits.amax(-1) > -torch.inf).all()):
            raise DataError("No token may follow: the model gives all of them probability zero.")
        if self.temperature == 0:
            likeliest = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, likeliest, 1.0)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, places = logits.sort(descending=True, stable=True)
            chances = ordered.softmax(-1)
            surplus = chances.cumsum(-1) - chances >= self.top_p  # reached without this token
            surplus = torch.zeros_like(surplus).scatter_(-1, places, surplus)
            logits = logits.masked_fill(surplus, -torch.inf)
        chances = logits.softmax(-1)
        if self.min_p > 0:
            chances = chances * (chances >= self.min_p * chances.amax(-1, keepdim=True))
        return chances / chances.sum(-1, keepdim=True)

    def _penalised(self, logits: Tensor, prompt: list[int], written: list[list[int]]) -> Tensor:
        if not self._changes_logits:
            return logits
        logits = logits.clone()
        for row, ids in zip(logits, written, strict=True):
            seen = torch.tensor(sorted({*prompt, *ids}), device=row.device)
            values = row[seen]
            penalty = torch.tensor(self.repetition_penalty, device=row.device)
            row[seen] = values * torch.where(values > 0, 1 / penalty, penalty)
            if counts := Counter(ids):
                tokens = torch.tensor(list(counts), device=row.device)
                times = torch.tensor(list(counts.values()), device=row.device)
                row[tokens] -= self.presence_penalty + self.frequency_penalty * times
            for token, bias in self.bias.items():
                row[token] += bias
        return logits

    def decode(self, reader: Reader, task: Task) -> list[Continuation]:
        """`texts` continuations, in the order of their random numbers."""
        prompt = task.prompt[0].tolist()
        logits, _, state = reader.read(task.prompt)
        rows = list(range(task.texts))
        state = reader.select(state, [0] * task.texts)
        logits = logits[:, -1].expand(task.texts, -1)
        written: list[list[int]] = [[] for _ in rows]
        likelihood = [0.0] * task.texts
        sources = [random_numbers(task.seed + row) for row in rows]
        while True:
            logits = task.allowed(logits, [written[row] for row in rows])
            chances = self.probabilities(logits, prompt, [written[row] for row in rows])
            logs = logits.float().log_softmax(-1)
            for place, row in enumerate(rows):
                token = draw(chances[place], sources[row])
                written[row].append(token)
                likelihood[row] += float(logs[place, token])
                if task.emit is not None:
                    task.emit(token)
            going = [place for place, row in enumerate(rows) if not task.is_finished(written[row])]
            if not going:
                return [task.continuation(*text) for text in zip(written, likelihood, strict=True)]
            if len(going) < len(rows):
                state, rows = reader.select(state, going), [rows[place] for place in going]
            last = torch.tensor([[written[row][-1]] for row in rows])
            logits, _, state = reader.read(last, state)
            logits = logits[:, -1]


GREEDY = Sampling(temperature=0.0)


def random_numbers(seed: int) -> torch.Generator:
    """The random numbers of one text."""
    return torch.Generator().manual_seed(seed)


def draw(probabilities: Tensor, source: torch.Generator) -> int:
    """A token drawn from `probabilities` [V], which need not sum to one."""
    reached = probabilities.double().cumsum(-1).cpu()
    number = torch.rand((), generator=source, dtype=torch.float64) * reached[-1]
    token = int(torch.searchsorted(reached, number, right=True))
    if token < len(reached):  # beyond it if the number was rounded up
        return token
    return int(probabilities.nonzero()[-1])
