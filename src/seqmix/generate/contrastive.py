"""Contrastive search: among the likeliest tokens the one whose features are least like those of the text so far.

    v = argmax over the k likeliest v   (1 - a) p(v | x) - a max_j cos(h_v, h_j)

h_v are the features of v read after the text, before the head, and h_j those of every token of prompt and text. The
candidates are read in one batch from copies of the state. With a = 0, or one candidate, it takes the likeliest token.
Su et al. 2022 (arXiv:2202.06417), equation 5. Axes: K candidates, T time, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from seqmix.core.errors import RangeError
from seqmix.generate._method import Continuation, Method, Task, at_least, within
from seqmix.generate._reader import Reader


@dataclass(frozen=True, kw_only=True)
class Contrastive(Method):
    """Contrastive search among `candidates` tokens; `weight` is the a of the equation."""

    candidates: int = 4
    weight: float = 0.6

    def __post_init__(self) -> None:
        at_least("candidates", self.candidates, 1)
        within("weight", self.weight, 0, 1)

    def decode(self, reader: Reader, task: Task) -> list[Continuation]:
        """The one text that is found."""
        if task.texts > 1:
            raise RangeError(f"texts={task.texts}: contrastive search finds one text.")
        logits, features, state = reader.read(task.prompt)
        logits, known = logits[:, -1], F.normalize(features[0].float(), dim=-1)
        ids: list[int] = []
        likelihood = 0.0
        while True:
            chances = task.allowed(logits, [ids]).float().softmax(-1)[0]
            count = min(self.candidates, int(chances.count_nonzero()))
            values, tokens = chances.topk(count)
            states = reader.select(state, [0] * count)
            logits, features, states = reader.read(tokens.unsqueeze(1), states)
            new = F.normalize(features[:, -1].float(), dim=-1)
            likeness = (new @ known.T).amax(1)
            best = int(((1 - self.weight) * values - self.weight * likeness).argmax())
            ids.append(int(tokens[best]))
            likelihood += float(values[best].log())
            if task.emit is not None:
                task.emit(ids[-1])
            if task.is_finished(ids):
                return [task.continuation(ids, likelihood)]
            state, logits = reader.select(states, [best]), logits[best : best + 1, -1]
            known = torch.cat([known, new[best : best + 1]])
