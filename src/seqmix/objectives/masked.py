"""Masked language modelling: some tokens are hidden, and predicted from what is left on both sides.

    loss = -mean_{t in M} log p(x_t | corrupted x)

M is a random share of all places. Of them 80% show the mask token, 10% a random token and 10% the true one.
For `SeqmixForMaskedLM`. Devlin et al. 2019 (arXiv:1810.04805), section 3.1; a share of 0.3 to 0.4 as in Wettig et al.
2023 (arXiv:2202.08005).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.objectives._objective import (
    Inputs,
    Objective,
    ObjectiveConfig,
    check_shares,
    check_text,
)


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    mask_id: int = 258
    vocabulary: int = 258  # random tokens are drawn below it
    share: float = 0.15  # of the places that are scored, at least one per row
    shown_as_mask: float = 0.8  # of those
    shown_as_random: float = 0.1

    def __post_init__(self) -> None:
        shares = {"share": self.share, "shown_as_mask": self.shown_as_mask}
        check_shares("masked", **shares, shown_as_random=self.shown_as_random)
        if self.shown_as_mask + self.shown_as_random > 1:
            raise ConfigError(
                f"masked: shown_as_mask={self.shown_as_mask} and shown_as_random={self.shown_as_random} are "
                "together more than all scored places."
            )


class Masked(Objective):
    """The same number of places in every row, so that rows weigh the same."""

    Config: ClassVar = Config

    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        check_text("masked", ids, 1)
        c = self.config
        count = max(1, round(c.share * ids.shape[1]))
        rank = torch.rand(ids.shape, generator=generator).argsort(dim=1).argsort(dim=1)
        scored = rank < count
        fate = torch.rand(ids.shape, generator=generator)
        random = torch.randint(c.vocabulary, ids.shape, generator=generator)
        shown = torch.where(scored & (fate < c.shown_as_mask), c.mask_id, ids)
        at_random = (fate >= c.shown_as_mask) & (fate < c.shown_as_mask + c.shown_as_random)
        shown = torch.where(scored & at_random, random, shown)
        return {"input_ids": shown, "labels": ids.masked_fill(~scored, IGNORED)}


OBJECTIVE = Masked
