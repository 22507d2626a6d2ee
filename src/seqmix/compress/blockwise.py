"""Blockwise: weights and embedding in 4 bits, and what flows between them in 8, with a factor per block of entries.

    u' = step_g round(u / step_g),   step_g from the entries of block g alone

A block is `block` neighbouring inputs, of an output (weights) or of a token (what norms, activations, attention
and gates give to the next layer). No text is read, and nothing is trained. What is computed inside a mixer, such as the
softmax of attention, keeps its precision; its results are rounded.
Dong et al. 2023 (arXiv:2304.01483), section 3. Their factors are powers of two, ours whole multiples of a factor per
output (`seqmix.linears.int4`).
"""

from __future__ import annotations

from dataclasses import dataclass

from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.compress.int4 import in_four_bits
from seqmix.compress.int8 import chosen
from seqmix.core.errors import ConfigError
from seqmix.linears.tied import Tied
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.rebuild import replaced


@dataclass(frozen=True, kw_only=True)
class Blockwise(Transform):
    block: int = 32  # entries that share a factor
    input_bits: int = 8  # of what goes into linear layers

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"blockwise: block={self.block}, wanted at least 1.")
        if not 2 <= self.input_bits <= 16:
            raise ConfigError(f"blockwise: input_bits={self.input_bits}, wanted 2 to 16.")

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        found = chosen(model, None, embedding=True)
        layers = in_four_bits(found, self.block, work, input_bits=self.input_bits)
        if "embedding" in layers and model.config.to_spec().tied:
            layers["head"] = Tied()
        return replaced(model, layers)

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        found = chosen(model, None, embedding=True)
        return Needs(memory_mb=24 * max(x.weight.numel() for x in found.values()) / 1e6)


TRANSFORM = Blockwise
