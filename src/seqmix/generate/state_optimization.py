"""Hidden-state optimisation: the state of a text is corrected by gradients of what came next, the weights stay.

    s' = s - r |s| g / |g|,   g = d loss(window | s) / d s     per tensor of the state, |.| the root mean square

A text is read in windows. Each is scored from the state before it; then that state is moved so that the window would
have been likelier, and the window is read again from there. Every token is scored before it is used. It works on any
state of floating-point numbers: keys and values as in the papers, or that of a recurrence.
Yoshida & Gimpel 2021 (arXiv:2112.08653), section 2, which use Adam's steps and also move the states of the window
itself; Yoshida 2024 (arXiv:2408.16241).

Axes: B batch, T time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.core.errors import RangeError
from seqmix.core.state import State, map_state
from seqmix.models.backbone import LanguageModel
from seqmix.models.hf import SeqmixForCausalLM


def score_with_optimized_states(
    model: SeqmixForCausalLM, ids: Tensor, *, window: int = 32, rate: float = 0.01, steps: int = 1
) -> Tensor:
    """The loss in nats [B, T - 1] of every token of ids [B, T] but the first, with states that are optimised.

    The arguments are those of `read_with_optimized_states`.
    """
    return read_with_optimized_states(model, ids, window=window, rate=rate, steps=steps)[0]


def read_with_optimized_states(
    model: SeqmixForCausalLM, ids: Tensor, *, window: int = 32, rate: float = 0.01, steps: int = 1
) -> tuple[Tensor, State]:
    """The losses [B, T - 1] in nats, and the state after ids[:, :-1], from which the last token can be read.

    Args:
        model: a causal language model; its weights get no gradients.
        ids: token ids [B, T], without pads.
        window: tokens between two corrections of the state.
        rate: how far a state moves, as a share of its size; 0 for a plain reading.
        steps: moves per window.

    Raises:
        RangeError: for a window, rate or number of steps that is out of range.
    """
    if window < 1 or rate < 0 or steps < 1:
        raise RangeError(
            f"window={window}, rate={rate}, steps={steps}, wanted at least 1, 0 and 1."
        )
    inside = model.model
    state: State = None
    scores = []
    pieces = zip(ids[:, :-1].split(window, 1), ids[:, 1:].split(window, 1), strict=True)
    for given, following in pieces:
        with torch.no_grad():
            logits, after = inside(given, state)
        scores.append(_losses(logits, following))
        if rate and state is not None:
            for _ in range(steps):
                state = _moved(inside, state, given, following, rate)
            with torch.no_grad():
                after = inside(given, state)[1]
        state = after
    return torch.cat(scores, dim=1), state


def _moved(
    model: LanguageModel, state: State, given: Tensor, following: Tensor, rate: float
) -> State:
    """The state, moved once against the gradient of the loss of what follows it."""
    moving: list[Tensor] = []  # collected here: a growing tensor shows only views of itself

    def free(leaf: Tensor) -> Tensor:
        copy = leaf.detach().clone().requires_grad_(leaf.is_floating_point())
        if copy.requires_grad:
            moving.append(copy)
        return copy

    with torch.enable_grad():
        variable = map_state(free, state)
        loss = _losses(model(given, variable)[0], following).sum()
        gradients = iter(torch.autograd.grad(loss, moving))

    def move(leaf: Tensor) -> Tensor:
        if not leaf.requires_grad:
            return leaf
        leaf, gradient = leaf.detach(), next(gradients)
        places = tuple(range(1, leaf.ndim))  # every row moves on its own
        sizes = [x.square().mean(places, keepdim=True).sqrt() for x in (leaf, gradient)]
        return leaf - rate * sizes[0] * gradient / sizes[1].clamp_min(1e-20)

    return map_state(move, variable)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return flat.view_as(labels)
