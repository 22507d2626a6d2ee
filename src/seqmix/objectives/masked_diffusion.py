"""Masked diffusion: a random share of a target is masked, and predicted from its source and from what is left of it.

    loss = E_t [ 1/t * 1/N * sum_{j masked} -log p(y_j | x, masked y) ],   t uniform in (0, 1)

A text is a source x, of which nothing is masked, and its target y of N tokens, each of which is masked with chance t.
The weight 1/t makes the loss a bound on -log p(y | x) / N, so the model is a generative one: it writes by
`seqmix.generate.diffusion`. For `SeqmixForMaskedLM`. Sahoo et al. 2024 (arXiv:2406.07524), equation 10; as of language
models in Nie et al. 2025 (arXiv:2502.09992), equation 3, and Gong et al. 2025 (arXiv:2506.20639), equation 1.
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
    mask_id: int = 258
    tokens: int | None = None  # of the target, the last ones of a text; without it, all

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"masked_diffusion: tokens={self.tokens}, wanted at least 1.")


class MaskedDiffusion(Objective):
    """The times of a batch are spread evenly over (0, 1), which lowers the variance and changes no mean."""

    Config: ClassVar = Config

    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        tokens = ids.shape[-1] if self.config.tokens is None else self.config.tokens
        check_text("masked_diffusion", ids, tokens)
        rows = torch.randperm(len(ids), generator=generator)
        times = (rows + torch.rand(len(ids), generator=generator)) / len(ids)
        times = times.clamp_min(1e-3)
        masked = torch.zeros(ids.shape, dtype=torch.bool)
        shape = (len(ids), tokens)
        masked[:, -tokens:] = torch.rand(shape, generator=generator) < times.unsqueeze(1)
        weights = masked / (times.unsqueeze(1) * tokens)
        shown = ids.masked_fill(masked, self.config.mask_id)
        return {"input_ids": shown, "labels": ids, "weights": weights}

    def loss(self, model: Any, inputs: Inputs) -> Tensor:
        logits = model(input_ids=inputs["input_ids"]).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), inputs["labels"], reduction="none")
        return (losses * inputs["weights"]).sum(dim=1).mean()


OBJECTIVE = MaskedDiffusion
