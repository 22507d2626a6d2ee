"""Log-probabilities of an answer's tokens, as reinforcement learning wants them: exact, or estimated by masks.

A causal model gives them in one call. A masked diffusion model predicts only what is masked, so they are estimated:

    log p(y_j) ~ 1/2 (m_j l_j(M) / t + m'_j l_j(M') / (1 - t) + l_j(all)),    t uniform from 0.2 to 0.8

with l_j(M) = log p(y_j | x, y without M), m_j = 1 for j in M and else 0, and the chance t of each place to be in M and
1 - t to be in M'. With `complementary_masks`, M' is what is not in M, so that every token is counted exactly once, and
always in part of its context; with `independent_masks`, which has the same mean and costs as much, some are
counted twice and some never. Gong et al. 2025 (DiffuCoder, arXiv:2506.20639), section 5 and equation 13, with one
pair; range and weights as in the authors' code.

Axes: B rows, S tokens of a prompt, N of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from seqmix.objectives import target_logits

LEAST, MOST = 0.2, 0.8  # of the chance t

# Log-probabilities [B, N] by a model, of answers [B, N] after prompts [B, S]; the generator decides what is drawn.
Likelihood = Callable[[Any, Tensor, Tensor, Generator], Tensor]
# Two masks from uniform numbers' generator: chances [B, 1], and how many places N.
Masks = Callable[[Tensor, int, Generator], tuple[Tensor, Tensor]]


def causal(model: Any, prompts: Tensor, answers: Tensor, generator: Generator) -> Tensor:
    """[B, N], exact, by a model that writes `answers` [B, N] in order after `prompts` [B, S]."""
    return _of_tokens(target_logits(model, prompts, answers), answers)


def complementary_masks(chance: Tensor, places: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """M [B, N] with this chance [B, 1] of each place, and all other places."""
    mask = torch.rand(len(chance), places, generator=generator) < chance
    return mask, ~mask


def independent_masks(chance: Tensor, places: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """M [B, N] with this chance [B, 1] of each place, and another one with one minus it."""
    first, second = torch.rand(2, len(chance), places, generator=generator)
    return first < chance, second < 1 - chance


@dataclass(frozen=True, kw_only=True)
class Masked:
    """The estimate [B, N] by a masked diffusion model, in three model calls; a `Likelihood`."""

    mask_id: int
    masks: Masks = complementary_masks

    def __call__(
        self, model: Any, prompts: Tensor, answers: Tensor, generator: Generator
    ) -> Tensor:
        chance = LEAST + (MOST - LEAST) * torch.rand(len(answers), 1, generator=generator)
        drawn = self.masks(chance, answers.shape[1], generator)
        hidden = torch.cat([*drawn, torch.ones_like(drawn[0])]).to(answers.device)
        weights = torch.cat([1 / chance, 1 / (1 - chance), torch.ones_like(chance)])
        three = answers.repeat(3, 1)
        texts = torch.cat([prompts.repeat(3, 1), three.masked_fill(hidden, self.mask_id)], dim=1)
        found = _of_tokens(model(texts).logits[:, prompts.shape[1] :], three)
        weighted = weights.to(answers.device) * hidden * found
        return weighted.unflatten(0, (3, -1)).sum(dim=0) / 2


def _of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """[B, N] of logits [B, N, V]."""
    found = logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1))
    return found.squeeze(-1)
