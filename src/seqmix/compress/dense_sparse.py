"""Dense times sparse: every linear layer of the blocks becomes small bases times sparse codes, trained on the loss.

    W_b = D_b S_b,    S_b = the `entries` largest of every column of C_b,    dL/dC_b := dL/dS_b

where W_b are `height` rows of a weight. The first factors come from the weight alone: orthogonal matching pursuit for
the codes, least squares for the bases, in turn. Then all bases D_b and all codes C_b of the model learn together from
its loss; the choice of entries is a step that gradients pass straight through, so entries that are not chosen learn
too and may be chosen later. In the end only what is chosen is kept.
Chand et al. 2023 (arXiv:2312.13211), the straight-through factoriser. Their text was not at hand here in full:
sizes and the first factors are ours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.compress._activations import linear_layers
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.linears import replace_layer
from seqmix.linears.dense_sparse import MOST_ATOMS, DenseSparseLinear
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.rebuild import replaced

ROUNDS = 8  # of codes and bases in turn, for the first factors
PURSUED = 1 << 14  # columns at a time
RIDGE = 1e-6  # which makes least squares with unused or equal atoms solvable


@dataclass(frozen=True, kw_only=True)
class DenseSparse(Transform):
    quick: ClassVar = {"steps": 2, "batch": 1}

    remove: float = 0.5  # share of the bytes of the factorised weights
    height: int = 16  # rows of a block; there are at most twice as many atoms
    steps: int = (
        50  # of training on the calibration text; without, the factors know the weights alone
    )
    batch: int = 4  # windows per step
    learning_rate: float = 1e-3
    layers: str | None = None  # only layers whose place holds this, such as `channel`

    def __post_init__(self) -> None:
        if not 0 <= self.remove < 1:
            raise ConfigError(f"dense_sparse: remove={self.remove}, wanted at least 0 and below 1.")
        if not 1 <= self.height <= MOST_ATOMS // 2:
            raise ConfigError(
                f"dense_sparse: height={self.height}, wanted 1 to {MOST_ATOMS // 2}, as atoms have numbers of 8 bits."
            )
        if self.steps < 0 or self.batch < 1 or self.learning_rate <= 0:
            raise ConfigError(
                f"dense_sparse: steps={self.steps}, batch={self.batch}, learning_rate={self.learning_rate}, "
                "wanted at least 0, at least 1, and more than 0."
            )

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        made = copy.deepcopy(model).eval()
        made.requires_grad_(False)
        factors: dict[str, Factors] = {}
        layers = list(linear_layers(made.model.backbone))
        for name, layer in work.track(layers, "factorising"):
            place = f"backbone.{name}"
            sizes = sizes_for(layer, self.remove, self.height)
            if sizes is not None and (self.layers is None or self.layers in place):
                factors[place] = Factors.of(layer, *sizes)
                replace_layer(made.model, place, factors[place])
        if not factors:
            raise ConfigError(
                f"dense_sparse: layers={self.layers!r}, remove={self.remove}, height={self.height} leave no dense "
                "linear layer to factorise. Leave out `layers`, remove less, or factorise before other steps."
            )
        if self.steps:
            windows = data.windows.to(model.device)
            learn(
                made,
                windows,
                steps=self.steps,
                batch=self.batch,
                learning_rate=self.learning_rate,
            )
        work.notes["layers"] = len(factors)
        return replaced(model, {place: layer.sparse() for place, layer in factors.items()})

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        layers = [layer for _, layer in linear_layers(model.model.backbone)]
        entries = sum(layer.weight.numel() for layer in layers)
        return Needs(
            training_tokens=self.steps * self.batch * data.windows.shape[1],
            memory_mb=10 * 4 * entries / 2**20,  # codes twice a weight, their gradients and moments
        )


def learn(
    model: SeqmixForCausalLM, windows: Tensor, *, steps: int, batch: int, learning_rate: float
) -> None:
    """Trains what of `model` requires gradients, in place, on windows [N, T] drawn at random (the same every time)."""
    from seqmix.train.loop import run
    from seqmix.train.plan import Plan

    order = torch.Generator().manual_seed(0)

    def drawn(_: int) -> dict[str, Tensor]:
        ids = windows[torch.randint(len(windows), (batch,), generator=order)]
        return {"input_ids": ids, "labels": ids}

    plan = Plan(
        steps=steps,
        tokens_per_step=batch * windows.shape[1],
        learning_rate=learning_rate,
        weight_decay=0.0,
        progress=False,
    )
    run(model, drawn, plan)


def sizes_for(layer: nn.Linear, remove: float, height: int) -> tuple[int, int, int] | None:
    """Height, atoms and entries that leave the share 1 - remove of the layer's bytes; None if none leave so few.

    The height is the largest that divides the outputs; bases take at most an eighth of the weight.
    """
    outputs, inputs = layer.weight.shape
    tall = max(h for h in range(1, height + 1) if outputs % h == 0)
    atoms = min(2 * tall, inputs // 8)
    each = layer.weight.element_size()
    left = (1 - remove) * tall * inputs * each - tall * atoms * each  # for the codes of one block
    entries = min(int(left / (inputs * (each + 1))), atoms)
    return (tall, atoms, entries) if entries >= 1 else None


class Factors(nn.Module):
    """A layer in training: bases [blocks, height, atoms], and codes [blocks, atoms, inputs] of which some count."""

    def __init__(self, basis: Tensor, codes: Tensor, entries: int, bias: Tensor | None) -> None:
        super().__init__()
        self.basis, self.codes = nn.Parameter(basis), nn.Parameter(codes)
        self.entries = entries
        self.bias = bias  # as it is

    @classmethod
    def of(cls, layer: nn.Linear, height: int, atoms: int, entries: int) -> Factors:
        """The factors nearest to a layer's weight that alternating steps find."""
        weight = layer.weight.detach()
        basis, codes = factorised(weight.float().unflatten(0, (-1, height)), atoms, entries)
        return cls(basis.to(weight), codes.to(weight), entries, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.codes.detach().abs().topk(self.entries, dim=1).indices
        mask = torch.zeros_like(self.codes).scatter_(1, chosen, 1.0)
        sparse = self.codes - (self.codes * (1 - mask)).detach()  # its gradient reaches every code
        return F.linear(x, (self.basis @ sparse).flatten(0, 1), self.bias)

    def sparse(self) -> DenseSparseLinear:
        """The layer with the chosen entries alone."""
        chosen = self.codes.detach().abs().topk(self.entries, dim=1).indices
        values = self.codes.detach().gather(1, chosen)
        bias = None if self.bias is None else self.bias.detach().clone()
        return DenseSparseLinear(self.basis.detach().clone(), values, chosen, bias)


@torch.no_grad()
def factorised(blocks: Tensor, atoms: int, entries: int) -> tuple[Tensor, Tensor]:
    """Bases [B, H, K] and codes [B, K, I] with so many entries per column, near to blocks [B, H, I]."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randperm(blocks.shape[-1], generator=generator)[:atoms].to(blocks.device)
    basis = F.normalize(blocks[..., first] + 1e-6, dim=1)
    eye = torch.eye(atoms, device=blocks.device)
    for _ in range(ROUNDS):
        codes = pursued(blocks, basis, entries)
        moments = codes @ codes.mT
        size = moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        ridge = RIDGE * size[:, None, None] * eye
        basis = torch.linalg.solve(moments + ridge, codes @ blocks.mT).mT
        unused = basis.norm(dim=1, keepdim=True) < 1e-6  # such atoms start again, from a column
        basis = F.normalize(torch.where(unused, blocks[..., first] + 1e-6, basis), dim=1)
    return basis, pursued(blocks, basis, entries)


def pursued(blocks: Tensor, basis: Tensor, entries: int) -> Tensor:
    """Codes [B, K, I] by orthogonal matching pursuit (Pati et al. 1993): one more atom at a time, all values anew."""
    columns = max(1, PURSUED // len(blocks))
    return torch.cat([_pursued(part, basis, entries) for part in blocks.split(columns, -1)], dim=-1)


def _pursued(blocks: Tensor, basis: Tensor, entries: int) -> Tensor:
    number, inputs = len(blocks), blocks.shape[-1]
    gram = basis.mT @ basis  # [B, K, K]
    wanted = basis.mT @ blocks  # [B, K, I]
    codes = torch.zeros_like(wanted)
    chosen = torch.zeros(number, 0, inputs, dtype=torch.long, device=blocks.device)
    row = torch.arange(number, device=blocks.device)[:, None, None, None]
    for _ in range(entries):
        left = (wanted - gram @ codes).abs()
        left.scatter_(1, chosen, -1.0)  # an atom is chosen once
        chosen = torch.cat([chosen, left.argmax(1, keepdim=True)], dim=1)
        places = chosen.mT  # [B, I, n]
        small = gram[row, places[..., :, None], places[..., None, :]]
        small = small + RIDGE * torch.eye(places.shape[-1], device=blocks.device)
        values = torch.linalg.solve(small, wanted.gather(1, chosen).mT)
        codes = torch.zeros_like(wanted).scatter_(1, chosen, values.mT)
    return codes


TRANSFORM = DenseSparse
