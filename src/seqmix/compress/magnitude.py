"""Magnitude: the units (heads, neurons, state-space channels, experts) with the smallest weights go.

    score of a unit = mean over its tensors of (norm of its rows)^2 / (mean of that over the units of the sublayer)

The plain baseline of structured pruning; Han et al. 2015 (arXiv:1506.02626) for single weights. It reads no text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqmix.compress._cut import cut
from seqmix.compress._structure import Units, keep_best, parameters_per_unit, sublayer, units_of
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.models.hf import SeqmixForCausalLM


@dataclass(frozen=True, kw_only=True)
class Magnitude(Transform):
    remove: float = 0.25  # share of the weights that belong to units

    def __post_init__(self) -> None:
        if not 0 <= self.remove < 1:
            raise ConfigError(f"magnitude: remove={self.remove}, wanted at least 0 and below 1.")

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        units = units_of(model)
        if not units:
            raise ConfigError(
                "magnitude: no sublayer of this model has heads, neurons or experts that can be cut. Prune before "
                "other steps, or use finercut."
            )
        costs = {p: float(parameters_per_unit(sublayer(model, p), u)) for p, u in units.items()}
        scores = {place: magnitudes(sublayer(model, place), u) for place, u in units.items()}
        whole = sum(costs[place] * u.count for place, u in units.items())
        kept = keep_best(scores, units, costs, self.remove * whole)
        work.notes["kept"] = {f"{block} {part}": len(rows) for (block, part), rows in kept.items()}
        return cut(model, kept)

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        return Needs()


@torch.no_grad()
def magnitudes(module: nn.Module, units: Units) -> Tensor:
    """The score [count] of every unit; 1 on average."""
    scores = []
    tensors = dict(module.named_parameters())
    if units.experts is not None:
        experts = module.get_submodule(units.experts)
        assert isinstance(experts, nn.ModuleList)
        scores.append(
            torch.stack(
                [sum((p.square().sum() for p in e.parameters()), torch.zeros(())) for e in experts]
            )
        )
    for name, (dimension, sections) in units.axes.items():
        if name not in tensors:
            continue
        rows = (
            tensors[name].movedim(dimension, 0).flatten(1)
            if tensors[name].ndim > 1
            else tensors[name][:, None]
        )
        start = 0
        for section in sections:
            size = section.rows * (units.count if section.per_unit else 1)
            if section.per_unit and tensors[name].ndim > 1:
                part = rows[start : start + size].square().sum(-1)
                scores.append(part.view(units.count, -1).sum(-1))
            start += size
    return torch.stack([s / s.mean().clamp_min(1e-30) for s in scores]).mean(0)


TRANSFORM = Magnitude
