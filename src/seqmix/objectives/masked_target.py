"""Masked target: some tokens of a target are hidden, and predicted from its source and from what is left of it.

    loss = -mean_{t in M} log p(y_t | x, y without M),   |M| uniform from 1 to N

A text is a source x, followed by a target y of N tokens. So a masked language model learns to write: a target that is
all masks is filled at once or in a few passes (`seqmix.generate.mask_predict`). For `SeqmixForMaskedLM`, whose weights
are all taken over and which gets no new ones.
Ghazvininejad et al. 2019 (arXiv:1904.09324), section 3.1. Yoshida 2024 (arXiv:2408.16241) begins an encoder and a
decoder from a masked language model; here one model reads source and target side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.objectives._objective import Inputs, Objective, ObjectiveConfig, check_text


@dataclass(frozen=True, kw_only=True)
class Config(ObjectiveConfig):
    mask_id: int = 258
    tokens: int = 8  # of the target, the last ones of a text

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"masked_target: tokens={self.tokens}, wanted at least 1.")


class MaskedTarget(Objective):
    """Every row hides a number of its own."""

    Config: ClassVar = Config

    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        tokens = self.config.tokens
        check_text("masked_target", ids, tokens + 1)
        shape = (len(ids), tokens)
        count = torch.randint(1, tokens + 1, (len(ids), 1), generator=generator)
        rank = torch.rand(shape, generator=generator).argsort(dim=1).argsort(dim=1)
        source = torch.zeros(len(ids), ids.shape[1] - tokens, dtype=torch.bool)
        hidden = torch.cat([source, rank < count], dim=1)
        return {
            "input_ids": ids.masked_fill(hidden, self.config.mask_id),
            "labels": ids.masked_fill(~hidden, IGNORED),
        }


OBJECTIVE = MaskedTarget
