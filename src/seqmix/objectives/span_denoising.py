"""Span denoising: stretches of a text are each replaced by one mark, and the target spells them out.

    text     a b c d e f g h        source   a <1> d e <2> h        target   <1> b c <2> f g <3>

A share of all tokens is hidden, in spans whose mean length is given. For every model that writes: encoder-decoders,
and decoders that read the source first (masked language modelling of decoders in Wang et al. 2022,
arXiv:2204.05832). Raffel et al. 2020 (arXiv:1910.10683), section 3.1.4: share 0.15, mean length 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from seqmix.core.errors import ConfigError
from seqmix.objectives._objective import (
    Inputs,
    ObjectiveConfig,
    TargetObjective,
    check_shares,
    check_text,
)


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    first_mark: int = 258  # the marks are this id and those after it, one more than there are spans
    share: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        check_shares("span_denoising", share=self.share)
        if self.mean_span < 1:
            raise ConfigError(f"span_denoising: mean_span={self.mean_span}, wanted at least 1.")

    def spans(self, length: int) -> tuple[int, int]:
        """How many tokens of a text are hidden, and in how many spans."""
        hidden = min(max(1, round(self.share * length)), length - 1)
        spans = min(max(1, round(hidden / self.mean_span)), length - hidden)
        return hidden, spans


class SpanDenoising(TargetObjective):
    """As many hidden tokens and spans in every row, so that all rows have the same length."""

    Config: ClassVar = Config

    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        check_text("span_denoising", ids, 2)
        hidden, spans = self.config.spans(ids.shape[1])
        rows = [self._cut(row, hidden, spans, generator) for row in ids]
        source, target = (torch.stack(part) for part in zip(*rows, strict=True))
        return {"source": source, "target": target}

    def _cut(
        self, ids: Tensor, hidden: int, spans: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Kept and hidden stretches in turn, the first kept one may be empty and so may the last."""
        lengths = _composition(hidden, spans, generator)
        # Between two spans at least one token is kept; before the first and after the last there may be none.
        kept = _composition(len(ids) - hidden + 2, spans + 1, generator)
        kept[0] -= 1
        kept[-1] -= 1
        source, target, place = [], [], 0
        for number in range(spans):
            mark = ids.new_tensor([self.config.first_mark + number])
            begin = place + int(kept[number])
            end = begin + int(lengths[number])
            source += [ids[place:begin], mark]
            target += [mark, ids[begin:end]]
            place = end
        source.append(ids[place:])
        target.append(ids.new_tensor([self.config.first_mark + spans]))
        return torch.cat(source), torch.cat(target)


def _composition(total: int, parts: int, generator: Generator) -> Tensor:
    """`parts` positive whole numbers with the sum `total`, each way to choose them equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    ends = torch.cat([cuts, cuts.new_tensor([total])])
    return torch.diff(ends, prepend=ends.new_zeros(1))


OBJECTIVE = SpanDenoising
