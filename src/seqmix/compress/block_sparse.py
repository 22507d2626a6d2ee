"""Block sparse: of every linear layer of the blocks, only the blocks of weights that matter most stay.

    score of a block = sum over its weights of W_oi^2 E[x_i^2]
    kept weights of outputs o = argmin over V of E[(W_o x - V x_S)^2] = W_o M_:S M_SS^-1,   M = E[x x^T]

S are the inputs that these outputs keep. Without `activations`, the score is the sum of W_oi^2, no weight moves, and no
text is read. Each block of the model sees what the sparse ones before it give. What is left runs on the sparse
kernel.
Shen et al. 2023 (arXiv:2306.16601), section 3: blocks of four outputs by one input; Sun et al. 2023
(arXiv:2306.11695), section 3: the score; Hassibi & Stork 1992: kept weights make up for lost ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqmix.compress._activations import first_inputs, linear_layers, second_moments, through
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.linears import Replacement, replace_layer
from seqmix.linears.block_sparse import BlockSparse, largest_blocks
from seqmix.linears.quantized_block_sparse import QuantizedBlockSparse
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.rebuild import replaced
from seqmix.ops.quantized_sparse_matmul import SIDE

RIDGE = 1e-3  # of the mean moment: kept weights stay near where they were in directions that are hardly seen


@dataclass(frozen=True, kw_only=True)
class ToBlockSparse(Transform):
    remove: float = 0.9  # share of the weights
    activations: bool = (
        True  # weights count by what flows through them, and kept ones make up for lost ones
    )
    quantized: bool = False  # what stays, in 8 bits
    layers: str | None = None  # only layers whose place holds this, such as `channel`
    tokens: int = 8192  # of the calibration text

    def __post_init__(self) -> None:
        if not 0 <= self.remove < 1:
            raise ConfigError(f"block_sparse: remove={self.remove}, wanted at least 0 and below 1.")
        if self.tokens < 1:
            raise ConfigError(f"block_sparse: tokens={self.tokens}, wanted at least 1.")

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        made = copy.deepcopy(model).eval().model
        x = None
        if self.activations:
            x = first_inputs(made, data.first(self.tokens).to(model.device))
        found: dict[str, Replacement] = {}
        for number, block in enumerate(work.track(made.backbone.blocks, "making sparse")):
            place = f"backbone.blocks.{number}."
            layers = {
                name: layer
                for name, layer in linear_layers(block)
                if layer.out_features % SIDE == 0
                and (self.layers is None or self.layers in place + name)
            }
            moments = {} if x is None else second_moments(block, layers, x)
            for name, layer in layers.items():
                if x is None or name in moments:
                    sparse = made_sparse(layer, self.remove, moments.get(name))
                    kept = QuantizedBlockSparse.of(sparse) if self.quantized else sparse
                    found[place + name] = kept
                    replace_layer(block, name, kept)
            if x is not None:
                x = through(block, x)
        if not found:
            raise ConfigError(
                f"block_sparse: layers={self.layers!r} leaves no dense linear layer whose outputs are a multiple of "
                f"{SIDE}. Leave out `layers`, or make weights sparse before other steps."
            )
        work.notes["layers"] = len(found)
        return replaced(model, found)

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        if not self.activations:
            return Needs()
        layers = [layer for _, layer in linear_layers(model.model.backbone)]
        widest = max((layer.in_features for layer in layers), default=0)
        activations = self.tokens * model.config.hidden_size * 4
        return Needs(
            forward_tokens=2 * self.tokens,
            memory_mb=(8 * 8 * widest**2 + 4 * activations) / 2**20,
        )


@torch.no_grad()
def made_sparse(layer: nn.Linear, remove: float, moments: Tensor | None = None) -> BlockSparse:
    """The layer without the share `remove` of its blocks, by the second moments [I, I] of its inputs if given."""
    if moments is None:
        return BlockSparse.of(layer, sparsity=remove)
    weight = layer.weight.double()
    mask = largest_blocks(weight * moments.diagonal().sqrt(), remove)
    ridge = RIDGE * moments.diagonal().mean().clamp_min(1e-30)
    whole = moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    wanted = weight @ whole  # [O, I]
    fitted = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        outputs = slice(row * SIDE, (row + 1) * SIDE)
        inputs = kept.nonzero().flatten()
        inner = torch.linalg.cholesky(whole[inputs[:, None], inputs])
        fitted[outputs, inputs] = torch.cholesky_solve(wanted[outputs, inputs].T, inner).T
    made = copy.deepcopy(layer)
    made.weight.copy_(fitted)
    return BlockSparse.of(made, mask=mask)


TRANSFORM = ToBlockSparse
