"""Insertion: tokens of a target are left out, and which they are and where they go is predicted from the rest.

    loss = -1/n sum_{j left out} log p(gap of j, y_j | x, the rest of y)  -  log p(complete or not | x, the rest of y)

    p(i, v | ...) = softmax over all gaps i and words v together of the logits [T, V]

A text is a source x, of which nothing is left out, and its target y of N tokens. n of them, uniform from 0 to N, are
left out; each belongs to the gap behind the token that is left before it, so that the first term is the cross-entropy
with the counts of every word in every gap, divided by n. The logit of a word of its own, `stop_id`, at the last place
of the source says by its sigmoid whether nothing is left out. Pads may end a target. The model writes by
`seqmix.generate.insertion`; it is a `SeqmixForMaskedLM` without new weights, where the paper has a layer for the second
term. Patel et al. 2025 (arXiv:2505.05755), equations 2 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.errors import ConfigError
from seqmix.objectives._objective import Inputs, Objective, ObjectiveConfig, check_text


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    stop_id: int = 258
    pad_id: int = 259
    tokens: int = 8  # of the target with its pads, the last ones of a text

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"insertion: tokens={self.tokens}, wanted at least 1.")


class Insertion(Objective):
    """What is left out is hidden by the attention mask, so that it takes no place."""

    Config: ClassVar = Config

    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        tokens = self.config.tokens
        check_text("insertion", ids, tokens + 1)
        real = ids != self.config.pad_id
        real[:, :-tokens] = True
        order = torch.rand(len(ids), tokens, generator=generator)
        order = order.masked_fill(~real[:, -tokens:], 2.0)
        rank = order.argsort(dim=1).argsort(dim=1)
        most = real[:, -tokens:].sum(dim=1, keepdim=True)
        count = (torch.rand(len(ids), 1, generator=generator) * (most + 1)).long()
        left_out = torch.zeros_like(real)
        left_out[:, -tokens:] = rank < count
        return {"ids": ids, "attention_mask": (real & ~left_out).long(), "left_out": left_out}

    def loss(self, model: Any, inputs: Inputs) -> Tensor:
        ids, left_out = inputs["ids"], inputs["left_out"]
        seen = inputs["attention_mask"] != 0
        last = ids.shape[1] - self.config.tokens - 1  # of the source, the first gap
        logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, last:]
        chances, is_complete = insertion_logits(logits.float(), seen[:, last:], self.config.stop_id)
        log_chances = chances.flatten(1).log_softmax(-1).unflatten(1, chances.shape[1:])
        places = torch.arange(chances.shape[1], device=ids.device).expand_as(seen[:, last:])
        gaps = places.where(seen[:, last:], 0).cummax(dim=1).values
        rows = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        found = log_chances[rows, gaps, ids[:, last:]]
        missing = left_out[:, last:]
        count = missing.sum(dim=1)
        inserted = -found.where(missing, 0.0).sum(dim=1) / count.clamp_min(1)
        stopped = F.binary_cross_entropy_with_logits(
            is_complete, (count == 0).float(), reduction="none"
        )
        return (inserted + stopped).mean()


def insertion_logits(logits: Tensor, seen: Tensor, stop_id: int) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] of inserting word v behind place t, and those [B] of the target being complete.

    From logits [B, T, V] at the last place of the source and all places of the target; `seen` [B, T] marks tokens that
    are there: nothing is inserted behind others.
    """
    is_complete = logits[:, 0, stop_id]
    stop = torch.arange(logits.shape[-1], device=logits.device) == stop_id
    return logits.masked_fill(~seen.unsqueeze(-1) | stop, -torch.inf), is_complete


OBJECTIVE = Insertion
