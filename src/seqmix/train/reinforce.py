"""Reinforcement learning from rewards of groups of answers: GRPO, for every model whose answers have a likelihood.

    A_i = (r_i - mean r) / (std r + eps)    within the group of answers to one prompt
    loss = -mean_{i, j} min(rho_ij A_i, clip(rho_ij, 1 - c, 1 + c) A_i),    rho_ij = p(y_ij) / p_old(y_ij)

Every step draws prompts and a group of answers to each, and uses them for a few updates. Shao et al. 2024
(arXiv:2402.03300), section 4.1, here without a reference model. With `seqmix.train.likelihood.Masked` it is the
coupled-GRPO of Gong et al. 2025 (DiffuCoder, arXiv:2506.20639), section 5: every update has masks of its own, the same
for p and p_old, so that the ratio compares like with like.

Axes: P prompts, S tokens of a prompt, G answers in a group, N tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from seqmix.core.errors import RangeError, ShapeError
from seqmix.train.likelihood import Likelihood

EPSILON = 1e-4  # beside the standard deviation of rewards

Write = Callable[
    [Any, Tensor, int], Tensor
]  # answers [B, N] of a model to prompts [B, S], by a seed
Reward = Callable[[Tensor, Tensor], Tensor]  # [B] of prompts [B, S] and answers [B, N]


@dataclass(frozen=True, kw_only=True)
class Group:
    """How many answers are drawn and how they are learned from."""

    prompts: int = 16  # of a step
    answers: int = 8  # to each of them
    updates: int = 2  # with the answers of a step
    clip: float = 0.2
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.answers < 2 or self.updates < 1 or self.clip <= 0:
            raise RangeError(
                f"prompts={self.prompts}, answers={self.answers}, updates={self.updates}, clip={self.clip}, "
                "wanted at least 1, 2 and 1, and a clip above 0."
            )


def advantages(rewards: Tensor) -> Tensor:
    """[P, G] of rewards [P, G]: 0 where all answers to a prompt are worth the same."""
    deviation = rewards.std(dim=1, correction=0, keepdim=True)
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (deviation + EPSILON)


def clipped_loss(new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The loss of log-probabilities [B, N] under the model and under the one that wrote; `advantage` is [B]."""
    ratio = (new - old).exp()
    gain = advantage.unsqueeze(1)
    return -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain).mean()


def reinforce(
    model: nn.Module,
    prompts: Tensor,
    write: Write,
    reward: Reward,
    likelihood: Likelihood,
    *,
    steps: int,
    group: Group | None = None,
    seed: int = 0,
) -> list[float]:
    """Changes `model` in place so that what it writes is worth more; returns the mean reward of every step.

    Args:
        model: any model that `write` and `likelihood` can use; it is in evaluation mode throughout.
        prompts: token ids [P, S], drawn from with replacement.
        write: draws answers.
        reward: what answers are worth.
        likelihood: of `seqmix.train.likelihood`, with gradients.

    Raises:
        ShapeError: for prompts that are not [P, S].
    """
    if prompts.ndim != 2 or not len(prompts):
        raise ShapeError(f"`prompts` has shape {list(prompts.shape)}, wanted [P, S].")
    group = group or Group()
    model.eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=group.learning_rate, weight_decay=0.0, fused=True
    )
    random = Generator().manual_seed(seed)
    history = []
    for _ in range(steps):
        chosen = torch.randint(len(prompts), (group.prompts,), generator=random)
        asked = prompts[chosen].repeat_interleave(group.answers, dim=0)
        answers = write(model, asked, _seed(random))
        rewards = reward(asked, answers).float()
        gain = advantages(rewards.view(group.prompts, group.answers)).flatten()
        history.append(rewards.mean().item())
        masks = [_seed(random) for _ in range(group.updates)]
        with torch.no_grad():
            old = [likelihood(model, asked, answers, Generator().manual_seed(m)) for m in masks]
        for before, mask in zip(old, masks, strict=True):
            new = likelihood(model, asked, answers, Generator().manual_seed(mask))
            clipped_loss(new, before, gain, group.clip).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return history


def _seed(random: Generator) -> int:
    return int(torch.randint(2**31, (), generator=random))
