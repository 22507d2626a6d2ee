"""Unlearning: a language model loses some texts and keeps others.

Gradient ascent raises the loss of what is to be forgotten, in every weight. Constrained unlearning changes a few
channel mixers only, those that causal tracing points at (`seqmix.analyze.causal_tracing`), by the joint loss

    L = -L_forget + alpha L_retain,   alpha = clip(a b^rise + c, least, most),

where `rise` is how far the loss of what is to be kept stands above its value before. The better it is kept, the less
it counts. Agrawal and Huang 2025 (arXiv:2504.12996): a = 0.3, b = 6, c = 0.8, alpha in [1.2, 2.8].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.core.errors import RangeError
from seqmix.models.channel_mixers import channel_mixers

Texts = Mapping[
    str, Tensor
]  # input_ids, attention_mask and labels [B, T], as a language model takes them
Objective = Callable[[Any], Tensor]  # from the model to a loss


@dataclass(frozen=True, kw_only=True)
class Retention:
    """alpha as a function of how far the loss of what is to be kept has risen, in nats."""

    a: float = 0.3
    b: float = 6.0
    c: float = 0.8
    least: float = 1.2
    most: float = 2.8

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise RangeError(f"least={self.least}, most={self.most}, wanted 0 <= least <= most.")

    def weight(self, rise: float) -> float:
        exponent = min(rise, 100.0)  # a diverged model must not overflow the power
        return min(max(self.a * self.b**exponent + self.c, self.least), self.most)


def gradient_ascent(forget: Texts) -> Objective:
    """The naive objective: minus the cross-entropy of what is to be forgotten."""
    return lambda model: -model(**forget, use_cache=False).loss


def joint_objective(
    forget: Texts, retain: Texts, *, retention: Retention | None = None
) -> Objective:
    """-L_forget + alpha L_retain; the reference of the rise is L_retain when it is first called."""
    retention = retention or Retention()
    before: list[float] = []

    def objective(model: Any) -> Tensor:
        kept = model(**retain, use_cache=False).loss
        before.append(kept.item())
        alpha = retention.weight(kept.item() - before[0])
        return alpha * kept - model(**forget, use_cache=False).loss

    return objective


def layers_of(model: nn.Module, layers: Iterable[int]) -> list[nn.Parameter]:
    """The weights of the channel mixers of these layers; raises `RangeError` for one that there is not."""
    mixers = channel_mixers(model)
    numbers = list(layers)
    if not numbers or min(numbers) < 0 or max(numbers) >= len(mixers):
        raise RangeError(f"layers={numbers}, wanted some of 0 to {len(mixers) - 1}.")
    return [weight for number in numbers for weight in mixers[number].parameters()]


def unlearn(
    model: nn.Module,
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    *,
    steps: int,
    learning_rate: float,
    observe: Callable[[int], None] = lambda step: None,
) -> None:
    """Changes `parameters` of the model, and no others, by `steps` steps of AdamW without weight decay.

    `observe` is called with the number of steps done, after each; the model is in evaluation mode throughout.
    """
    model.eval()
    with only_trainable(model, parameters):
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        for step in range(steps):
            objective(model).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            observe(step + 1)


@contextmanager
def only_trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block, gradients are computed for `parameters` alone."""
    chosen = {id(weight) for weight in parameters}
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        for weight, _ in before:
            weight.requires_grad_(id(weight) in chosen)
        yield
    finally:
        for weight, flag in before:
            weight.requires_grad_(flag)
