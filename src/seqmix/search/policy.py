"""A space of cheaper models: for every sublayer of a model, how much of it is kept and in how many bits.

A policy is one choice per gene: a gene is a sublayer (`0 mixer`, `0 channel`, ...) or the embedding with the head, and
its choices are pairs of a share of the units (`seqmix.compress.elastic`) and 8 or 32 bits per weight.
Sridhar et al. 2023 (arXiv:2312.13301), section 3; their spaces are those of the super-networks that they take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from seqmix.compress._structure import language_model, sublayers
from seqmix.compress.elastic import PARTS, sub_network
from seqmix.compress.int8 import chosen
from seqmix.core.errors import ConfigError
from seqmix.linears import Replacement
from seqmix.linears.int8 import Int8
from seqmix.linears.tied import Tied
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.rebuild import replaced

BITS = (8, 32)
EMBEDDING = "embedding"

Policy = tuple[int, ...]  # the number of a choice, for every gene
Choice = tuple[float, int]  # share of the units, bits per weight


@dataclass(frozen=True)
class Space:
    """Genes and their choices, in order."""

    blocks: int
    genes: Mapping[str, tuple[Choice, ...]]

    @classmethod
    def of(
        cls,
        model: SeqmixForCausalLM,
        *,
        mixers: Sequence[float] = (1.0,),
        channels: Sequence[float] = (1.0,),
        bits: Sequence[int] = BITS,
    ) -> Space:
        """All that can be made of `model` with these shares of mixers and channel mixers (0: left out)."""
        shares = {"mixer": mixers, "channel": channels}
        for name, values in (("mixers", mixers), ("channels", channels)):
            if 1.0 not in values or not all(0 <= value <= 1 for value in values):
                raise ConfigError(f"{name}={tuple(values)}, wanted shares from 0 to 1, and 1.")
        if not bits or not set(bits) <= set(BITS):
            raise ConfigError(f"bits={tuple(bits)}, wanted some of {BITS}.")
        genes: dict[str, tuple[Choice, ...]] = {}
        for block, part in sublayers(model):
            kept = sorted(share for share in shares[part] if share)
            left_out = ((0.0, bits[0]),) if 0 in shares[part] else ()
            genes[f"{block} {part}"] = left_out + tuple((s, b) for s in kept for b in bits)
        genes[EMBEDDING] = tuple((1.0, b) for b in bits)
        return cls(len(language_model(model).backbone.blocks), genes)

    def whole(self, bits: int) -> Policy:
        """The model as it is, all in so many bits."""
        return tuple(choices.index((1.0, bits)) for choices in self.genes.values())

    def draw(self, generator: Generator) -> Policy:
        """Any policy, each as likely as the others."""
        return tuple(
            int(torch.randint(len(choices), (), generator=generator))
            for choices in self.genes.values()
        )

    def features(self, policy: Policy) -> Tensor:
        """A one for every choice that the policy makes, zeros for the others: [choices of all genes]."""
        parts = [
            torch.nn.functional.one_hot(torch.tensor(number), len(choices))
            for number, choices in zip(policy, self.genes.values(), strict=True)
        ]
        return torch.cat(parts).double()

    def shares(self, policy: Policy) -> Tensor:
        """The sub-network [blocks, 2] of `seqmix.compress.elastic`."""
        table = torch.ones(self.blocks, len(PARTS))
        for name, (share, _) in self._choices(policy).items():
            if name != EMBEDDING:
                block, part = name.split()
                table[int(block), PARTS.index(part)] = share
        return table

    def make(self, model: SeqmixForCausalLM, policy: Policy) -> SeqmixForCausalLM:
        """The model that the policy says; `model` stays as it was."""
        made = sub_network(model, self.shares(policy))
        layers: dict[str, Replacement] = {}
        for name, (share, bits) in self._choices(policy).items():
            if not share or bits == 32:
                continue
            if name == EMBEDDING:
                tied = made.config.to_spec().tied
                layers["embedding"] = Int8.of(made.model.embedding)
                layers["head"] = Tied() if tied else Int8.of(made.model.head)
            else:
                place = f"blocks.{name.replace(' ', '.')}."
                found = chosen(made, place, embedding=False)
                layers |= {inside: Int8.of(layer) for inside, layer in found.items()}
        return (replaced(made, layers) if layers else made).eval()

    def describe(self, policy: Policy) -> dict[str, Any]:
        """The choices by gene, as plain values."""
        return {name: list(choice) for name, choice in self._choices(policy).items()}

    def _choices(self, policy: Policy) -> dict[str, Choice]:
        return {
            name: choices[number]
            for (name, choices), number in zip(self.genes.items(), policy, strict=True)
        }
