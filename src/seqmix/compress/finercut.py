"""FinerCut: single mixers and channel mixers go, those first whose removal changes the output distribution least.

Zhang et al. 2024 (arXiv:2405.18218), section 3: greedy over single sublayers, no retraining. Of the paper's measures of
change this is the Jensen-Shannon divergence of the predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqmix.compress._greedy import remove_greedily
from seqmix.compress._structure import cut, sublayers
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.models.hf import SeqmixForCausalLM


@dataclass(frozen=True, kw_only=True)
class FinerCut(Transform):
    quick: ClassVar = {"tokens": 64}

    remove: float = 0.25  # share of the mixers and channel mixers
    tokens: int = 256  # of the calibration text
    shortlist: int | None = None  # candidates tried from the second step on; all, as in the paper

    def __post_init__(self) -> None:
        check("finercut", self.remove, self.tokens, self.shortlist)

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        places = sublayers(model)
        gone = remove_greedily(
            model,
            [[place] for place in places],
            round(self.remove * len(places)),
            data.first(self.tokens).to(model.device),
            work,
            shortlist=self.shortlist,
        )
        work.notes["removed"] = [
            {"block": block, "part": part, "change": change}
            for places, change in gone
            for block, part in places
        ]
        return cut(model, {place: () for places, _ in gone for place in places})

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        return greedy_needs(model, len(sublayers(model)), self.remove, self.tokens, self.shortlist)


def check(name: str, remove: float, tokens: int, shortlist: int | None) -> None:
    """Raises `ConfigError` for options of greedy removal that are out of range."""
    if not 0 <= remove < 1 or tokens < 1 or (shortlist is not None and shortlist < 1):
        raise ConfigError(
            f"{name}: remove={remove}, tokens={tokens}, shortlist={shortlist}, wanted a share of at least 0 and "
            "below 1, and at least 1 for the others (or shortlist=none)."
        )


def greedy_needs(
    model: SeqmixForCausalLM, candidates: int, remove: float, tokens: int, shortlist: int | None
) -> Needs:
    """A candidate costs half of the blocks on average; the distributions of all tokens are held three times."""
    steps = round(remove * candidates)
    tried = sum(
        min(candidates - step, shortlist if step and shortlist else candidates)
        for step in range(steps)
    )
    return Needs(
        forward_tokens=tokens * (tried // 2 + steps + 1),
        memory_mb=4 * tokens * model.config.vocab_size * 4 / 2**20,
    )


TRANSFORM = FinerCut
