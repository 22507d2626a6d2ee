"""int4: the weights of linear layers, and the embedding, in 4 bits with a factor per group; no data is needed.

A group's step is the one with the least squared error among some that cut large weights off. What cannot be grouped,
since its inputs are no multiple of `group`, keeps its precision, like all that `int8` leaves alone.
`seqmix.linears.int4` says what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from seqmix.compress._quantizers import four_bits
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.compress.int8 import chosen
from seqmix.core.errors import ConfigError
from seqmix.linears import Replacement
from seqmix.linears.int4 import Int4
from seqmix.linears.tied import Tied
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.rebuild import replaced


@dataclass(frozen=True, kw_only=True)
class ToInt4(Transform):
    group: int = 32  # neighbouring inputs of an output that share a factor
    layers: str | None = None  # only layers whose place holds this, such as `channel`
    embedding: bool = True  # the embedding and the head too

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ConfigError(f"int4: group={self.group}, wanted at least 1.")

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        layers = in_four_bits(
            chosen(model, self.layers, embedding=self.embedding), self.group, work
        )
        if "embedding" in layers and model.config.to_spec().tied:
            layers["head"] = Tied()
        return replaced(model, layers)

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        found = chosen(model, self.layers, embedding=self.embedding)
        widest = max(layer.weight.numel() for layer in found.values())
        return Needs(memory_mb=24 * widest / 1e6)


def in_four_bits(
    found: dict[str, nn.Linear | nn.Embedding],
    group: int,
    work: Work,
    *,
    input_bits: int | None = None,
) -> dict[str, Replacement]:
    """Layers of 4 bits for those that the group divides; raises `ConfigError` where there is none."""
    fitting = {p: layer for p, layer in found.items() if layer.weight.shape[1] % group == 0}
    if not fitting:
        raise ConfigError(
            f"group={group} divides the inputs of no dense layer. Choose a divisor of the width."
        )
    work.notes["layers"] = len(fitting)
    work.notes["left dense"] = sorted(found.keys() - fitting.keys())
    return {
        place: Int4.of(layer, *four_bits(layer.weight, group), input_bits=input_bits)
        for place, layer in work.track(fitting.items(), "rounding")
    }


TRANSFORM = ToInt4
