"""Linearise: attention gives way to a mixer whose state does not grow, but for the layers that would be missed most.

Every attention layer over all earlier tokens gets a mixer `to` with its weights, which learns to give what the layer
gave (`seqmix.convert.linearize`). The layers whose replacement alone changes the predictions most keep their attention.
What is lost beyond that, `recover` brings back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from seqmix.compress._training import trained
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.convert.linearize import (
    attention_blocks,
    damages,
    linearized,
    mixer_of,
    transfer,
    transfer_errors,
    with_attention_of,
)
from seqmix.core.errors import ConfigError
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.train.folder import RunFolder
from seqmix.train.plan import Record

MEASURED = 4  # at most so many windows, which no mixer learns from, measure the errors


@dataclass(frozen=True, kw_only=True)
class Linearize(Transform):
    quick: ClassVar = {"transfer_tokens": 128, "damage_tokens": 32}

    to: str = "liger"  # a causal mixer, such as mamba2 or liger(window=32)
    keep: float | str = (
        0.25  # share of the attention layers that stay, or their blocks: 0+9+29, or 9+
    )
    transfer_tokens: int = 16384  # that the new mixers learn from; passes over the text as needed
    learning_rate: float = 3e-3
    damage_tokens: int = 256  # of the text on which the layers to keep are chosen

    def __post_init__(self) -> None:
        if isinstance(self.keep, int | float) and not 0 <= self.keep < 1:
            raise ConfigError(
                f"linearize: keep={self.keep}, wanted a share of at least 0 and below 1, or blocks such as 0+9+29."
            )
        if self.transfer_tokens < 0 or self.damage_tokens < 1 or self.learning_rate <= 0:
            raise ConfigError(
                f"linearize: transfer_tokens={self.transfer_tokens}, damage_tokens={self.damage_tokens}, "
                f"learning_rate={self.learning_rate}, wanted at least 0 and 1 tokens and a rate above 0."
            )

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        blocks = self._attention(model)
        kept = self._named(blocks)
        converted = [number for number in blocks if number not in kept]
        student = linearized(model, self.to, converted)
        measured, taught = (part.to(model.device) for part in split(data.windows))
        before = transfer_errors(student, model, converted, measured)
        used = {"tokens": 0.0, "seconds": 0.0}
        if self.transfer_tokens:
            steps = math.ceil(self.transfer_tokens / taught.shape[1])

            def train(
                made: SeqmixForCausalLM, folder: RunFolder | None
            ) -> tuple[SeqmixForCausalLM, Record]:
                record = transfer(
                    made,
                    model,
                    converted,
                    taught,
                    steps=steps,
                    learning_rate=self.learning_rate,
                    folder=folder,
                    progress=work.shown,
                )
                return made, record

            student, used = trained("transfer", student, data, work, self.to_dict(), train)
        after = transfer_errors(student, model, converted, measured)
        work.notes["errors"] = {
            str(number): {"before": before[number], "after": after[number]} for number in converted
        }
        work.notes["transfer"] = {name: used[name] for name in ("tokens", "seconds")}
        if isinstance(self.keep, str):
            work.notes["kept"] = kept
            return student
        texts = data.first(self.damage_tokens).to(model.device)
        damage = work.remember(
            "damage", lambda: [*damages(student, model, converted, texts).items()]
        )
        most = sorted(damage, key=lambda pair: -pair[1])[: round(self.keep * len(blocks))]
        kept = sorted(int(number) for number, _ in most)
        work.notes["damage"] = {str(number): value for number, value in damage}
        work.notes["kept"] = kept
        return with_attention_of(student, model, kept)

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        blocks = self._attention(model)
        half = len(blocks) // 2 + 1
        mixers = [mixer_of(model, number) for number in blocks]
        weights = sum(p.numel() for mixer in mixers for p in mixer.parameters())
        share = weights / model.num_parameters()
        chosen = 0 if isinstance(self.keep, str) else half * self.damage_tokens
        return Needs(
            forward_tokens=self.transfer_tokens + chosen,
            training_tokens=round(share * self.transfer_tokens),
            memory_mb=(4 * model.num_parameters() + 12 * weights) / 2**20,
        )

    def _attention(self, model: SeqmixForCausalLM) -> list[int]:
        blocks = attention_blocks(model)
        if not blocks:
            raise ConfigError(
                "linearize: the model has no attention over all earlier tokens, so its state does not grow. "
                "Leave out this step."
            )
        return blocks

    def _named(self, blocks: list[int]) -> list[int]:
        """The blocks that `keep` names, none where it is a share."""
        if not isinstance(self.keep, str):
            return []
        words = [word for word in self.keep.split("+") if word]
        if not all(word.isdecimal() and int(word) in blocks for word in words):
            raise ConfigError(
                f"linearize: keep={self.keep!r}, wanted numbers of blocks with attention such as "
                f"{'+'.join(map(str, blocks[:3]))}, or a share."
            )
        return sorted(map(int, words))


def split(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the windows [N, T] to measure on, and the others to learn from; a single one serves for both."""
    every = max(2, math.ceil(len(windows) / MEASURED))
    others = [number for number in range(len(windows)) if number % every]
    return windows[::every], windows[others] if others else windows


TRANSFORM = Linearize
