"""FinerCut: single mixers and channel mixers go, those first whose removal changes the output distribution least.

Zhang et al. 2024 (arXiv:2405.18218), section 3: greedy over single sublayers, no retraining. Three things are not the
paper's. The change is a Kullback-Leibler divergence, which follows the loss more closely than the Jensen-Shannon
divergence that the paper tries among others. It counts per parameter that goes, where the paper compares changes as
they are (power=0), so that small sublayers go first. And both sublayers of a block may go in one step, since together
they often change less than the sum of the two, which a greedy search of single ones cannot see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqmix.compress._cut import cut
from seqmix.compress._greedy import remove_greedily
from seqmix.compress._structure import Place, sublayers
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.models.hf import SeqmixForCausalLM

AGAIN = 10  # candidates that a step tries after the first one, about


@dataclass(frozen=True, kw_only=True)
class FinerCut(Transform):
    quick: ClassVar = {"tokens": 64}
    amount: ClassVar = "remove"

    remove: float = 0.25  # share of the mixers and channel mixers
    tokens: int = 512  # of the calibration text
    power: float = 1.0  # of the number of parameters that a change is divided by

    def __post_init__(self) -> None:
        check("finercut", self.remove, self.tokens)

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        found = candidates(model)
        gone = remove_greedily(
            model,
            found,
            [len(places) for places in found],
            round(self.remove * len(sublayers(model))),
            data.first(self.tokens).to(model.device),
            work,
            power=self.power,
        )
        work.notes["removed"] = [
            {"block": block, "part": part, "change": change}
            for places, change in gone
            for block, part in places
        ]
        return cut(model, {place: () for places, _ in gone for place in places})

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        number = round(self.remove * len(sublayers(model)))
        return greedy_needs(model, len(candidates(model)), number, self.tokens)


def candidates(model: SeqmixForCausalLM) -> list[list[Place]]:
    """What may go in one step: every sublayer, and both of a block."""
    both = [places for places in whole_blocks(model) if len(places) > 1]
    return [[place] for place in sublayers(model)] + both


def whole_blocks(model: SeqmixForCausalLM) -> list[list[Place]]:
    """The sublayers of every block that still has some."""
    found: dict[int, list[Place]] = {}
    for place in sublayers(model):
        found.setdefault(place[0], []).append(place)
    return list(found.values())


def check(name: str, remove: float, tokens: int) -> None:
    """Raises `ConfigError` for options of greedy removal that are out of range."""
    if not 0 <= remove < 1 or tokens < 1:
        raise ConfigError(
            f"{name}: remove={remove}, tokens={tokens}, wanted a share of at least 0 and below 1, and at least 1 token."
        )


def greedy_needs(model: SeqmixForCausalLM, candidates: int, steps: int, tokens: int) -> Needs:
    """All candidates are tried at the first step and a few later; one costs half of the blocks on average. The
    distributions of all tokens are held three times."""
    tried = candidates + AGAIN * (steps - 1) if steps else 0
    return Needs(
        forward_tokens=tokens * (tried // 2 + steps + 1),
        memory_mb=3 * tokens * model.config.vocab_size * 4 / 2**20,
    )


TRANSFORM = FinerCut
