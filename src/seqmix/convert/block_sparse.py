"""Long prompts of a pretrained model read with block-sparse attention, its weights as they are.

Source: Xu et al. 2025, XAttention (arXiv:2503.16428).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from seqmix.core import extras
from seqmix.core.errors import ConfigError
from seqmix.ops.block_sparse_attention import (
    BLOCK,
    STRIDE,
    antidiagonal_mass,
    block_sparse_attention,
    choose_blocks,
)

NAME = "seqmix_block_sparse"

Watch = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass
class Sparsity:
    """How many blocks have been computed, of those that causal attention computes."""

    computed: int = 0
    visible: int = 0

    @property
    def density(self) -> float:
        return self.computed / self.visible if self.visible else 1.0


@dataclass(frozen=True)
class _Settings:
    share: float | Tensor
    block: int
    stride: int
    watch: Watch | None
    sparsity: Sparsity


_settings: WeakKeyDictionary[nn.Module, _Settings] = WeakKeyDictionary()


@contextmanager
def block_sparse_prompts(
    model: nn.Module,
    *,
    share: float | Tensor = 0.9,
    block: int = BLOCK,
    stride: int = STRIDE,
    watch: Watch | None = None,
) -> Iterator[Sparsity]:
    """Inside, a transformers model attends to the chosen blocks of prompts of more than two blocks.

    Tokens that are generated, short prompts and padded batches are computed in full, as before.

    Args:
        model: any model whose layers call transformers' attention functions with queries and keys per head.
        share: how much of its attention each row of blocks keeps (as estimated); a number, or one per layer
            and head [layers, heads].
        block, stride: sizes of blocks, and of the squares whose antidiagonals are summed.
        watch: called with the layer's number, q [B, T, H, K], k [B, T, G, K] and the chosen blocks
            [B, H, M, N] of every such prompt.

    Yields:
        How many blocks have been computed so far.

    Raises:
        ConfigError: for a model without exchangeable attention, and for a share of another shape.
    """
    transformers = extras.require("transformers", extra="train")
    if not isinstance(model, transformers.PreTrainedModel):
        raise ConfigError(
            f"block_sparse_prompts: got {type(model).__name__}, wanted a model of transformers. "
            "Pass what AutoModelForCausalLM.from_pretrained gives."
        )
    _register()
    sparsity = Sparsity()
    settings = _Settings(share, block, stride, watch, sparsity)
    attentions = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    if isinstance(share, Tensor) and share.ndim:
        layers = 1 + max((int(m.layer_idx) for m in attentions), default=-1)
        if share.ndim != 2 or share.shape[0] != layers:
            raise ConfigError(
                f"block_sparse_prompts: `share` has shape {list(share.shape)}, wanted a number or "
                f"[layers, heads] with {layers} layers."
            )
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    for module in attentions:
        _settings[module] = settings
    try:
        yield sparsity
    finally:
        for module in attentions:
            _settings.pop(module, None)
        model.set_attn_implementation(before)


def _register() -> None:
    functions = extras.require("transformers.modeling_utils", extra="train")
    masks = extras.require("transformers.masking_utils", extra="train")
    if NAME not in functions.ALL_ATTENTION_FUNCTIONS:
        functions.ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
        masks.ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, masks.sdpa_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [B, H, T, K], key and value [B, G, S, K] to [B, T, H, K]."""
    settings = _settings.get(module)
    length, keys = query.shape[2], key.shape[2]
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if (
        settings is None
        or attention_mask is not None
        or not causal
        or dropout
        or length <= 2 * settings.block
        or (keys - length) % settings.block
    ):
        functions = extras.require("transformers.modeling_utils", extra="train")
        output, _ = functions.ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output, None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    share = settings.share
    if isinstance(share, Tensor) and share.ndim:
        share = share[layer]
    with torch.no_grad():
        mass = antidiagonal_mass(q, k, block=settings.block, stride=settings.stride, scale=scaling)
        blocks = choose_blocks(mass, share)
    rows, columns = blocks.shape[-2:]
    settings.sparsity.computed += int(blocks.sum())
    settings.sparsity.visible += blocks[..., 0, 0].numel() * (
        rows * columns - rows * (rows - 1) // 2
    )
    if settings.watch is not None:
        settings.watch(layer, q, k, blocks)
    return block_sparse_attention(q, k, v, blocks, block=settings.block, scale=scaling), None
