"""What a response depends on: its perplexity, and the attention that it pays to each segment of its context.

The measurements behind `seqmix.data.selection`. Axes: N samples, T time, S segments, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.core.errors import RangeError


@torch.no_grad()
def response_perplexity(model: Any, input_ids: Tensor, *, response: int) -> Tensor:
    """[N]: perplexity of the last `response` tokens of input_ids [N, T], given all before them."""
    _check(input_ids, response)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, -response - 1 : -1]
    losses = F.cross_entropy(
        logits.transpose(1, 2).float(), input_ids[:, -response:], reduction="none"
    )
    return losses.mean(-1).exp()


def segment_perplexity(
    model: Any, input_ids: Tensor, *, context: int, segments: int, response: int
) -> Tensor:
    """[N, S]: perplexity of the response with one segment of the first `context` tokens before the rest."""
    size = _segment_size(context, segments)
    rest = input_ids[:, context:]
    parts = input_ids[:, :context].split(size, dim=1)
    found = [
        response_perplexity(model, torch.cat([part, rest], dim=1), response=response)
        for part in parts
    ]
    return torch.stack(found, dim=1)


@torch.no_grad()
def segment_attention(
    model: Any, input_ids: Tensor, *, context: int, segments: int, response: int
) -> Tensor:
    """[N, S]: mean mixing weight of the positions that predict the response on each segment of the context.

    The mean over those positions, the heads and the layers of a seqmix model, by the mixing matrix of each mixer that
    is an attention.
    """
    _check(input_ids, response)
    size = _segment_size(context, segments)
    found: list[Tensor] = []

    def record(mixer: Any) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            matrix = mixer.matrix(inputs[0])[:, :, -response - 1 : -1, :context]  # [N, H, T, S * size]
            found.append(matrix.unflatten(-1, (segments, size)).sum(-1).mean((1, 2)))

        return hook

    mixers = [block.mixer for block in model.model.backbone.blocks]
    hooks = [
        mixer.register_forward_pre_hook(record(mixer))
        for mixer in mixers
        if mixer.operator == "attention"
    ]
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise RangeError("segment_attention: the model has no attention. Give one that has.")
    return torch.stack(found).mean(0)


def _segment_size(context: int, segments: int) -> int:
    if segments < 1 or context % segments:
        raise RangeError(
            f"segments={segments}, wanted a divisor of the context's {context} tokens."
        )
    return context // segments


def _check(input_ids: Tensor, response: int) -> None:
    if not 1 <= response < input_ids.shape[1]:
        raise RangeError(
            f"response={response}, wanted 1 to {input_ids.shape[1] - 1}: the samples have {input_ids.shape[1]} tokens."
        )
