"""Insertion: a model writes by putting one token at a time wherever it fits best, until nothing is missing.

    (i, v) = argmax p(i, v | x, y)  or a draw from it;   y <- y with v behind place i;   until p(complete | x, y) > 1/2

Nobody says how many tokens there will be: neither at the end of a text, nor in its gaps. What is `given` of the target
stays in its order, and the model fills in around it.
Patel et al. 2025 (arXiv:2505.05755), algorithm 2; the model as trained by `seqmix.objectives.insertion`.

Axes: B rows, S tokens of the source, N of the target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.core.errors import RangeError, ShapeError
from seqmix.models.encoder import SeqmixForMaskedLM
from seqmix.objectives.insertion import insertion_logits


@torch.no_grad()
def insert(
    model: SeqmixForMaskedLM,
    source: Tensor,
    *,
    new_tokens: int,
    stop_id: int,
    pad_id: int,
    given: Tensor | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Targets [B, N + new_tokens] that `model` writes after `source` [B, S], with pads at their ends.

    Args:
        model: a masked language model that was trained by `insertion`.
        source: token ids [B, S].
        new_tokens: at most so many insertions into each row.
        stop_id: the word whose logit says that nothing is missing; it is never written.
        pad_id: what stands behind the end of a target; it is never written either.
        given: tokens [B, N] of the target that are there already, with pads at their ends; none by default.
        temperature: 0 for the likeliest insertion; else it is drawn, as `seed` decides.

    Raises:
        ShapeError, RangeError: for arguments that do not fit.
    """
    if source.ndim != 2 or not source.shape[1]:
        raise ShapeError(f"`source` has shape {list(source.shape)}, wanted [B, S], S at least 1.")
    if new_tokens < 1 or temperature < 0:
        raise RangeError(
            f"new_tokens={new_tokens}, temperature={temperature}, wanted at least 1 and 0."
        )
    target = source.new_empty(len(source), 0) if given is None else given
    if target.ndim != 2 or len(target) != len(source):
        raise ShapeError(f"`given` has shape {list(target.shape)}, wanted [{len(source)}, N].")
    generator = torch.Generator(source.device).manual_seed(seed)
    is_open = torch.ones(len(source), dtype=torch.bool, device=source.device)
    first = source.shape[1] - 1
    for _ in range(new_tokens):
        ids = torch.cat([source, target], dim=1)
        seen = ids != pad_id
        seen[:, : first + 1] = True
        logits = model(ids, attention_mask=seen.long()).logits[:, first:].float()
        scores, is_complete = insertion_logits(logits, seen[:, first:], stop_id)
        scores[..., pad_id] = -torch.inf
        is_open &= is_complete <= 0
        if not bool(is_open.any()):
            break
        flat = scores.flatten(1)
        if temperature:
            chances = (flat / temperature).softmax(-1)
            choice = torch.multinomial(chances, 1, generator=generator)
        else:
            choice = flat.argmax(-1, keepdim=True)
        gap, word = choice // scores.shape[-1], choice % scores.shape[-1]
        target = put(target, gap, word.where(is_open.unsqueeze(1), pad_id), is_open, pad_id)
    missing = 0 if given is None else given.shape[1]
    return torch.nn.functional.pad(
        target, (0, missing + new_tokens - target.shape[1]), value=pad_id
    )


def put(target: Tensor, gap: Tensor, word: Tensor, is_open: Tensor, pad_id: int) -> Tensor:
    """`target` [B, N] with `word` [B, 1] at place `gap` [B, 1], [B, N + 1]; a pad at the end of rows not `is_open`."""
    gap = gap.where(is_open.unsqueeze(1), target.shape[1])
    places = torch.arange(target.shape[1] + 1, device=target.device).expand(len(target), -1)
    longer = torch.nn.functional.pad(target, (0, 1), value=pad_id)
    moved = longer.gather(1, places - (places > gap).long())
    return moved.where(places != gap, word)
