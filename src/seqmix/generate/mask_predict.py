"""Mask-predict: a masked language model writes all tokens at once, and again those that it was least sure of.

    y_t = argmax p(. | x, y) at every masked place, then the N (P - p) / P least likely are masked, in pass p of P

The number of model calls is P, however long the text is. The length N is given; a model that was trained on targets
that are filled up with an end token gives shorter ones by it.
Ghazvininejad et al. 2019 (arXiv:1904.09324), section 3.2; the model as trained by `seqmix.objectives.masked_target`.

Axes: B rows, S tokens of the source, N of the target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmix.core.errors import RangeError, ShapeError
from seqmix.models.encoder import SeqmixForMaskedLM


@torch.no_grad()
def mask_predict(
    model: SeqmixForMaskedLM, source: Tensor, *, length: int, mask_id: int, passes: int = 4
) -> Tensor:
    """What `model` writes after `source` [B, S], [B, length].

    Args:
        model: a masked language model that reads source and target side by side.
        source: token ids [B, S].
        length: tokens to be written.
        mask_id: what the model has learned to see at a place that is to be filled; it is never written.
        passes: model calls; 1 for tokens that do not know of each other.

    Raises:
        ShapeError, RangeError: for arguments that do not fit.
    """
    if source.ndim != 2:
        raise ShapeError(f"`source` has shape {list(source.shape)}, wanted [B, S].")
    if length < 1 or passes < 1:
        raise RangeError(f"length={length}, passes={passes}, wanted at least 1 of each.")
    target = source.new_full((len(source), length), mask_id)
    hidden = torch.ones_like(target, dtype=torch.bool)
    chances = torch.zeros(target.shape, device=source.device)
    for left in range(passes - 1, -1, -1):
        logits = model(torch.cat([source, target], dim=1)).logits[:, source.shape[1] :].float()
        logits[..., mask_id] = -torch.inf
        found, tokens = logits.softmax(-1).max(-1)
        target, chances = target.where(~hidden, tokens), chances.where(~hidden, found)
        again = length * left // passes
        if not again:
            break
        worst = chances.topk(again, largest=False).indices
        hidden = torch.zeros_like(hidden).scatter(1, worst, True)
        target = target.masked_fill(hidden, mask_id)
    return target
