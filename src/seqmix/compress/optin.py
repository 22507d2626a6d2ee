"""OPTIN: heads and neurons go in one shot, those first that bend the trajectory of features least per operation saved.

    score(u) = sum over blocks l after u's own of mean |G_l - G_l(u)|^2 + w KL(p || p(u)),   G_l = f_l f_l^T

f_l are the features of some tokens after block l, each of length 1, so that G_l holds their similarities; p are the
predictions; (u) is the model without unit u. A unit of the last block is scored on that block's own output. w makes
the second sum a tenth of the first on average. Units go in the order of score / operations until the budget is met:
the knapsack of the paper, up to one unit.
Khaki and Plataniotis 2024 (arXiv:2403.17921), section 3. Their published code also multiplies scores by a factor that
falls with a unit's number in its layer, and by decays for heads and for the last layer; these are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.compress._activations import first_inputs, predictions, through
from seqmix.compress._cut import M, cut
from seqmix.compress._structure import (
    Place,
    Units,
    flops_per_unit,
    keep_best,
    language_model,
    masked,
    sublayer,
    units_of,
)
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.compress.magnitude import magnitudes
from seqmix.core.errors import ConfigError

SAMPLED = 768  # tokens whose similarities are compared, as in the authors' code
PREDICTIONS = 0.1  # share of the predictions' term, relative to the features'


@dataclass(frozen=True, kw_only=True)
class Optin(Transform):
    quick: ClassVar = {"tokens": 64}

    remove: float = 0.25  # share of the blocks' operations
    tokens: int = 256  # of the calibration text
    groups: int | None = (
        16  # per sublayer, of units of similar magnitude scored together; none: singly, as in the paper
    )

    def __post_init__(self) -> None:
        if (
            not 0 <= self.remove < 1
            or self.tokens < 2
            or (self.groups is not None and self.groups < 1)
        ):
            raise ConfigError(
                f"optin: remove={self.remove}, tokens={self.tokens}, groups={self.groups}, wanted a share of at least "
                "0 and below 1, at least 2 tokens, and at least 1 group (or groups=none)."
            )

    def fit(self, model: M, data: Calibration, work: Work) -> M:
        units = self._units(model)
        ids = data.first(self.tokens).to(model.device)
        length = ids.shape[1]
        costs = {place: flops_per_unit(model, place, u, length) for place, u in units.items()}
        groups = {place: self._groups(model, place, u) for place, u in units.items()}
        was_training = model.training
        model.eval()
        try:
            errors = _errors(model, ids, units, groups, work)
        finally:
            model.train(was_training)
        features, change = torch.cat(list(errors.values())).mean(0).clamp_min(1e-30)
        weight = torch.stack([1 / features, PREDICTIONS / change])
        worth = {}
        for place, found in errors.items():
            worth[place] = torch.zeros(units[place].count)
            for score, members in zip(found @ weight, groups[place], strict=True):
                worth[place][members] = score / len(members) / costs[place]
        whole = language_model(model).backbone.cost(length).flops
        kept = keep_best(worth, units, costs, self.remove * whole)
        pruned = cut(model, kept)
        work.notes["kept"] = {f"{block} {part}": len(rows) for (block, part), rows in kept.items()}
        work.notes["operations left"] = language_model(pruned).backbone.cost(length).flops / whole
        return pruned

    def needs(self, model: M, data: Calibration) -> Needs:
        """A candidate costs the blocks from its own on: half of them on average."""
        tried = sum(min(u.count, self.groups or u.count) for u in self._units(model).values())
        blocks = len(language_model(model).backbone.blocks)
        similarities = min(SAMPLED, self.tokens) ** 2
        return Needs(
            forward_tokens=self.tokens * (tried // 2 + 1),
            memory_mb=4
            * (blocks * similarities + 3 * self.tokens * model.config.vocab_size)
            / 2**20,
        )

    def _units(self, model: M) -> dict[Place, Units]:
        units = {place: u for place, u in units_of(model).items() if u.entrances}
        if not units:
            raise ConfigError(
                "optin: no sublayer of this model has heads or neurons that can be cut. Prune before other steps, or "
                "use finercut."
            )
        return units

    def _groups(self, model: M, place: Place, units: Units) -> Sequence[Tensor]:
        order = magnitudes(sublayer(model, place), units).argsort()
        return order.tensor_split(min(self.groups or units.count, units.count))


@torch.no_grad()
def _errors(
    model: M,
    ids: Tensor,
    units: dict[Place, Units],
    groups: dict[Place, Sequence[Tensor]],
    work: Work,
) -> dict[Place, Tensor]:
    """For every group of units [groups, 2]: the error of the later features, and of the predictions."""
    inside = language_model(model)
    inputs = [first_inputs(inside, ids)]
    for block in inside.backbone.blocks:
        inputs.append(through(block, inputs[-1]))
    sample = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))[:SAMPLED]
    wanted = [similarities(x, sample) for x in inputs[1:]]
    target = predictions(model, inputs[-1]).log_softmax(-1)
    last = len(wanted) - 1

    def without(place: Place, members: Tensor) -> list[float]:
        start = place[0]
        mask = torch.ones(units[place].count).index_fill(0, members, 0)
        features, x = 0.0, inputs[start]
        with masked(model, {place: mask}):
            for number in range(start, last + 1):
                x = through(inside.backbone.blocks[number], x)
                if number > start or number == last:
                    features += float((similarities(x, sample) - wanted[number]).square().mean())
        changed = predictions(model, x).log_softmax(-1)
        change = F.kl_div(changed, target, reduction="none", log_target=True).sum(-1).mean()
        return [features, max(0.0, float(change))]

    def of(place: Place) -> list[list[float]]:
        return [without(place, members) for members in groups[place]]

    found = {}
    for place in work.track(list(units), "scoring"):
        name = f"errors of block {place[0]}, {place[1]}"
        found[place] = torch.tensor(work.remember(name, partial(of, place)))
    return found


def similarities(x: Tensor, sample: Tensor) -> Tensor:
    """The cosines between sampled tokens of features [N, T, D]: [tokens, tokens]."""
    tokens = F.normalize(x.flatten(0, 1)[sample].float(), dim=-1)
    return tokens @ tokens.T


TRANSFORM = Optin
