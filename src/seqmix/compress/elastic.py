"""Elastic: one model that holds smaller ones, each the first units (neurons, heads) of every sublayer.

    channel_m(x) = W_o[:, :m] f(W_u[:m] x)        m = share * hidden

A sub-network is a table of shares [blocks, 2]: of the heads of each block's mixer and of the neurons of its channel
mixer; 0 leaves the sublayer out. Training draws another one for every batch, so that all of them are models of their
own, and so are mixtures that were never drawn (Mix'n'Match, a share per block). Taking one out is a cut.
Devvrit et al. 2023 (arXiv:2310.07707), section 3; the authors' code adds the losses of all sizes up instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import functional_call

from seqmix.compress._cut import cut, select_units
from seqmix.compress._structure import Place, sublayer, sublayers, units_of, without
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError, ShapeError
from seqmix.mixers._attention import AttentionMixer
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.objectives import OBJECTIVES, Objective
from seqmix.objectives._objective import Inputs

PARTS = ("mixer", "channel")  # the columns of a table of shares
Draw = Callable[[Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class Elastic(Transform):
    """Meant for models trained with `Nested`: in others the first neurons are no better than the last."""

    share: float = (
        0.5  # of every channel mixer's units; of the first block's, where `last` is given
    )
    last: float | None = None  # of the last block's; the blocks between lie on a line
    heads: float = 1.0  # share of every mixer's units

    def __post_init__(self) -> None:
        for name in ("share", "last", "heads"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"elastic: {name}={value}, wanted a share above 0 and at most 1.")

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        blocks = len(model.model.backbone.blocks)
        shares = torch.full((blocks, 2), self.heads)
        last = self.share if self.last is None else self.last
        shares[:, 1] = torch.linspace(self.share, last, blocks)
        kept = first_units(model, shares)
        if not kept:
            raise ConfigError(
                "elastic: no sublayer of this model has heads, neurons or experts that can be cut. Take the smaller "
                "model out before other steps, or use finercut."
            )
        work.notes["kept"] = {f"{block} {part}": len(rows) for (block, part), rows in kept.items()}
        return cut(model, kept)

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        return Needs()


def first_units(model: Any, shares: Tensor) -> dict[Place, range]:
    """The units that a sub-network [blocks, 2] keeps of every sublayer: none at a share of 0, else at least one. A
    sublayer without units is whole or gone."""
    blocks = len(model.model.backbone.blocks)
    if shares.shape != (blocks, len(PARTS)):
        raise ShapeError(
            f"shares has shape {list(shares.shape)}, wanted [{blocks}, 2]: of the mixer and of the channel mixer of "
            "every block."
        )
    units, kept = units_of(model), {}
    for place in sublayers(model):
        share = float(shares[place[0], PARTS.index(place[1])])
        if not share:
            kept[place] = range(0)
        elif place in units:
            count = max(1, units[place].least, round(share * units[place].count))
            kept[place] = range(min(count, units[place].count))
    return kept


def sub_network(model: SeqmixForCausalLM, shares: Tensor) -> SeqmixForCausalLM:
    """The model that a sub-network [blocks, 2] is; `model` stays as it was."""
    return cut(model, first_units(model, shares))


def one_share(blocks: int, shares: Sequence[float]) -> Draw:
    """Sub-networks that keep one of `shares` of all channel mixers' neurons, drawn evenly, and all heads."""

    def draw(generator: Generator) -> Tensor:
        chosen = int(torch.randint(len(shares), (), generator=generator))
        return torch.tensor([[1.0, shares[chosen]]]).repeat(blocks, 1)

    return draw


class Nested(Objective):
    """Causal language modelling by another sub-network for every batch; `draw(generator)` gives its shares."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw
        self.causal = OBJECTIVES.get("causal")()

    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        return {**self.causal.inputs(ids, generator), "shares": self.draw(generator)}

    def loss(self, model: Any, inputs: Inputs) -> Tensor:
        given = {name: tensor for name, tensor in inputs.items() if name != "shares"}
        with narrowed(model, inputs["shares"]) as tensors:
            loss: Tensor = functional_call(model, tensors, kwargs=given).loss
        return loss


@contextmanager
def narrowed(model: Any, shares: Tensor) -> Iterator[dict[str, Tensor]]:
    """Inside the block, `model` called with these tensors (`functional_call`) is the sub-network.

    The tensors are parts of the model's own, so gradients reach it, and what is left out costs nothing.
    """
    kept, units = first_units(model, shares), units_of(model)
    tensors = dict(model.named_parameters())
    configs: dict[Place, Any] = {}
    try:
        for place, rows in kept.items():
            if not len(rows) or len(rows) == units[place].count:
                continue
            module: Any = sublayer(model, place)
            if units[place].experts or (
                place[1] == "mixer" and not isinstance(module, AttentionMixer)
            ):
                raise ConfigError(
                    f"shares: the {place[1]} of block {place[0]} is a {type(module).__name__}, but only attention and "
                    "plain channel mixers are narrowed in training. Give others a share of 1 or 0."
                )
            configs[place] = module.config
            options = units[place].options(len(rows), module.config.width)
            module.config = dataclasses.replace(module.config, **options)
            select_units(tensors, place, units[place], torch.tensor(rows))
        with without(model, [place for place, rows in kept.items() if not len(rows)]):
            names = {name for name, _ in model.named_parameters()}
            yield {name: tensor for name, tensor in tensors.items() if name in names}
    finally:
        for place, config in configs.items():
            sublayer(model, place).config = config


TRANSFORM = Elastic
