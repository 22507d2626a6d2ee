"""What training returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A trained model and how it came about.

    `history` has an entry per point of the loss curve: step, tokens, seconds, loss (mean since the entry
    before, in nats), learning_rate, and what was evaluated there. `seconds` and `tokens_per_second` leave
    out start-up, saving and evaluating. `forms` are the (operator, form) pairs that ran.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path | None
    history: list[dict[str, float]]
    evaluation: dict[str, float]
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    forms: list[tuple[str, str]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Everything but the model and the tokeniser, as plain values."""
        names = ("history", "evaluation", "steps", "tokens", "seconds", "tokens_per_second")
        values = {name: getattr(self, name) for name in names}
        return values | {"forms": [list(pair) for pair in self.forms]}
