"""Masked diffusion: a model fills a target that is all masks, at every step the places that it is surest of.

    y_j ~ softmax(logits_j / temperature) at every masked place j;   those with the highest p(y_j) stay, the others not

Nothing says in which order, so a model writes from left to right only as far as it has learned to; `order` tells when
each place was filled, and `seqmix.analyze.decoding_order` how far that is from left to right. What stays is never
changed again, unlike by `seqmix.generate.mask_predict`.
Confidence as in Chang et al. 2022 (arXiv:2202.04200), section 3.2, without noise on it; with a temperature, as language
models of code are decoded in Gong et al. 2025 (DiffuCoder, arXiv:2506.20639). The model as trained by
`seqmix.objectives.masked_diffusion`.

Axes: B rows, S tokens of the source, N of the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqmix.core.errors import RangeError, ShapeError
from seqmix.models.encoder import SeqmixForMaskedLM


class Filled(NamedTuple):
    """Token ids [B, N], and the number [B, N] of the step, from 0, in which each was written."""

    tokens: Tensor
    order: Tensor


@torch.no_grad()
def denoise(
    model: SeqmixForMaskedLM,
    source: Tensor,
    *,
    mask_id: int,
    length: int | None = None,
    given: Tensor | None = None,
    tokens_per_step: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> Filled:
    """What `model` writes after `source` [B, S].

    Args:
        model: a masked language model that was trained by `masked_diffusion`.
        source: token ids [B, S].
        mask_id: what the model has learned to see at a place that is to be filled; it is never written.
        length: tokens to be written; or `given`.
        given: a target [B, N], of which what is masked is to be written.
        tokens_per_step: places that are filled at each step.
        temperature: 0 for the likeliest word at each place; else it is drawn, as `seed` decides.

    Raises:
        ShapeError, RangeError: for arguments that do not fit.
    """
    if source.ndim != 2:
        raise ShapeError(f"`source` has shape {list(source.shape)}, wanted [B, S].")
    if (length is None) == (given is None):
        raise RangeError(f"length={length} and `given`: wanted exactly one of them.")
    if (length is not None and length < 1) or tokens_per_step < 1 or temperature < 0:
        raise RangeError(
            f"length={length}, tokens_per_step={tokens_per_step}, temperature={temperature}, wanted at "
            "least 1, 1 and 0."
        )
    if given is None:
        target = source.new_full((len(source), length or 0), mask_id)
    else:
        target = given.clone()
    if target.ndim != 2 or len(target) != len(source):
        raise ShapeError(f"`given` has shape {list(target.shape)}, wanted [{len(source)}, N].")
    generator = torch.Generator(source.device).manual_seed(seed)
    order = torch.full_like(target, -1)  # what was given
    for step in range(-(-int((target == mask_id).sum(dim=1).max()) // tokens_per_step)):
        logits = model(torch.cat([source, target], dim=1)).logits[:, source.shape[1] :].float()
        logits[..., mask_id] = -torch.inf
        chances = (logits / (temperature or 1.0)).softmax(-1)
        if temperature:
            words = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view_as(target)
        else:
            words = chances.argmax(-1)
        hidden = target == mask_id
        found = chances.gather(-1, words.unsqueeze(-1)).squeeze(-1).masked_fill(~hidden, -1.0)
        surest = found.topk(min(tokens_per_step, target.shape[1])).indices
        filled = torch.zeros_like(hidden).scatter(1, surest, True) & hidden
        target, order = target.where(~filled, words), order.masked_fill(filled, step)
    return Filled(target, order)
