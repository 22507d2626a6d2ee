"""FinerCut: single mixers and channel mixers go, those first whose removal changes the output distribution least.

Zhang et al. 2024 (arXiv:2405.18218), section 3: greedy over single sublayers, no retraining. Of the paper's measures of
change this is the Jensen-Shannon divergence of the predictions. By default the change counts per parameter that goes;
the paper compares changes as they are (power=0), whatever a sublayer frees, and then small sublayers go first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqmix.compress._cut import cut
from seqmix.compress._greedy import remove_greedily
from seqmix.compress._structure import sublayers
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.models.hf import SeqmixForCausalLM

AGAIN = 4  # candidates that a step tries after the first one, about


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
        places = sublayers(model)
        gone = remove_greedily(
            model,
            [[place] for place in places],
            round(self.remove * len(places)),
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
        return greedy_needs(model, len(sublayers(model)), self.remove, self.tokens)


def check(name: str, remove: float, tokens: int) -> None:
    """Raises `ConfigError` for options of greedy removal that are out of range."""
    if not 0 <= remove < 1 or tokens < 1:
        raise ConfigError(
            f"{name}: remove={remove}, tokens={tokens}, wanted a share of at least 0 and below 1, and at least 1 token."
        )


def greedy_needs(model: SeqmixForCausalLM, candidates: int, remove: float, tokens: int) -> Needs:
    """All candidates are tried at the first step and a few later; one costs half of the blocks on average. The
    distributions of all tokens are held three times."""
    steps = round(remove * candidates)
    tried = candidates + AGAIN * (steps - 1) if steps else 0
    return Needs(
        forward_tokens=tokens * (tried // 2 + steps + 1),
        memory_mb=3 * tokens * model.config.vocab_size * 4 / 2**20,
    )


TRANSFORM = FinerCut
