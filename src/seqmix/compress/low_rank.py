"""Low rank: every linear layer of the blocks becomes a product of two thin ones, without training.

    W' = U U^T W,   U = the first r left singular vectors of W L,   L L^T = mean of x x^T over the layer's inputs x

Of all matrices of rank r, W' has the least mean ||W x - W' x||^2 (Eckart & Young 1936, for W L). Without `whiten`, L is
the identity, and W' is the truncated SVD of W. The rank is what leaves r (inputs + outputs) = (1 - remove) inputs *
outputs entries.
Winata et al. 2020 (arXiv:1910.12582) and Cahyawijaya 2021 (arXiv:2108.10808): factorised Transformers; Wang et al.
2024 (SVD-LLM, arXiv:2403.07378), section 3.2: L from calibration. Each block sees what the factorised ones before it
give, and no weight is updated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from seqmix.compress._activations import first_inputs, linear_layers, second_moments, through
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.linears import replace_layer
from seqmix.linears.low_rank import LowRankLinear
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.rebuild import replaced

RIDGE = 1e-9  # of the mean moment, which makes the moments of few tokens positive definite


@dataclass(frozen=True, kw_only=True)
class LowRank(Transform):
    quick: ClassVar = {"tokens": 128}

    remove: float = 0.25  # share of the entries of the factorised weights
    whiten: bool = True  # the errors count by the layer's inputs; otherwise by the weight alone
    layers: str | None = None  # only layers whose place holds this, such as `channel`
    tokens: int = 8192  # of the calibration text

    def __post_init__(self) -> None:
        if not 0 <= self.remove < 1:
            raise ConfigError(f"low_rank: remove={self.remove}, wanted at least 0 and below 1.")
        if self.tokens < 1:
            raise ConfigError(f"low_rank: tokens={self.tokens}, wanted at least 1.")

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        made = copy.deepcopy(model).eval().model
        x = first_inputs(made, data.first(self.tokens).to(model.device))
        found: dict[str, LowRankLinear] = {}
        for number, block in enumerate(work.track(made.backbone.blocks, "factorising")):
            place = f"backbone.blocks.{number}."
            layers = {
                name: layer
                for name, layer in linear_layers(block)
                if self.layers is None or self.layers in place + name
            }
            for name, moments in second_moments(block, layers, x).items():
                rank = rank_for(layers[name], self.remove)
                if rank:
                    given = moments if self.whiten else None
                    found[place + name] = factorised(layers[name], rank, given)
                    replace_layer(block, name, found[place + name])
            x = through(block, x)
        if not found:
            raise ConfigError(
                f"low_rank: layers={self.layers!r}, remove={self.remove} leaves no dense linear layer to factorise. "
                "Leave out `layers`, remove less, or factorise before other steps."
            )
        work.notes["ranks"] = {place: layer.rank for place, layer in found.items()}
        return replaced(model, found)

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        layers = [layer for _, layer in linear_layers(model.model.backbone)]
        widest = max((layer.in_features for layer in layers), default=0)
        activations = self.tokens * model.config.hidden_size * 4
        return Needs(
            forward_tokens=2 * self.tokens,
            memory_mb=(8 * 8 * widest**2 + 4 * activations) / 2**20,
        )


def rank_for(layer: nn.Linear, remove: float) -> int:
    """The rank at which two factors have the share 1 - remove of the layer's entries; 0 if no rank has so few."""
    outputs, inputs = layer.weight.shape
    return int((1 - remove) * outputs * inputs / (outputs + inputs))


@torch.no_grad()
def factorised(layer: nn.Linear, rank: int, moments: Tensor | None = None) -> LowRankLinear:
    """The nearest layer of this rank, by the second moments [inputs, inputs] of its inputs if given, in float64."""
    weight = layer.weight.double()
    scaled = weight
    if moments is not None:
        ridge = RIDGE * moments.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        scaled = weight @ torch.linalg.cholesky(moments + ridge * eye)
    main = torch.linalg.svd(scaled, full_matrices=False).U[:, :rank]
    dtype = layer.weight.dtype
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return LowRankLinear((main.T @ weight).to(dtype), main.to(dtype).contiguous(), bias)


TRANSFORM = LowRank
