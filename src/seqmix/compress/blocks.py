"""Whole blocks go, those first whose removal changes the output distribution least: the coarse form of `finercut`.

Men et al. 2024 (ShortGPT, arXiv:2403.03853) and others remove whole blocks; chosen here by the measure of `finercut`,
so that the two differ in what may go alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqmix.compress._cut import cut
from seqmix.compress._greedy import remove_greedily
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.compress.finercut import check, greedy_needs, whole_blocks
from seqmix.models.hf import SeqmixForCausalLM


@dataclass(frozen=True, kw_only=True)
class Blocks(Transform):
    quick: ClassVar = {"remove": 0.5, "tokens": 64}
    amount: ClassVar = "remove"

    remove: float = 0.25  # share of the blocks
    tokens: int = 512  # of the calibration text

    def __post_init__(self) -> None:
        check("blocks", self.remove, self.tokens)

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        blocks = whole_blocks(model)
        gone = remove_greedily(
            model,
            blocks,
            [1] * len(blocks),
            round(self.remove * len(blocks)),
            data.first(self.tokens).to(model.device),
            work,
            power=0.0,
        )
        work.notes["removed"] = [
            {"block": places[0][0], "change": change} for places, change in gone
        ]
        return cut(model, {place: () for places, _ in gone for place in places})

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        blocks = len(whole_blocks(model))
        return greedy_needs(model, blocks, round(self.remove * blocks), self.tokens)


TRANSFORM = Blocks
