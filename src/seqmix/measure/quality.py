"""How good a language model is, in the figures by which a compressed one is held against its original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seqmix.measure.passkey import passkey_accuracy
from seqmix.measure.zero_shot import zero_shot

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from seqmix.train.evaluation import HeldOut


def quality(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    text: str,
    *,
    questions: int = 16,
    passkey_length: int | None = 256,
    passkeys: int = 10,
) -> dict[str, Any]:
    """Figures on text that no transform has seen.

    loss (nats per token), perplexity and bits_per_byte on `held_out`; zero_shot, the mean share of right answers over
    the kinds of `seqmix.measure.zero_shot` (`text` gives its passages), and zero_shot_by_kind; passkey, the share of
    passkeys retrieved from prompts of `passkey_length` tokens. No `questions` and no `passkey_length` leave these out.
    """
    found: dict[str, Any] = dict(held_out.evaluate(model))
    if questions:
        shares = zero_shot(model, tokenizer, text, questions=questions)
        found["zero_shot"] = shares.pop("mean")
        found["zero_shot_by_kind"] = shares
    if passkey_length:
        found["passkey"] = passkey_accuracy(model, tokenizer, passkey_length, passkeys)
    return found
