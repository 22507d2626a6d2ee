"""From the name of a text to windows that a language model trains and is scored on.

Language modelling has neither an oracle nor a chance level, so it is data and not one of
`seqmix.tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from seqmix.data.packing import Packed, WindowDataset, pack
from seqmix.data.text import Corpus, read_text, split_text
from seqmix.data.tokenizer import EOS, PAD, encode, special_id, token_bytes, tokenizer_from

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class LanguageModelling:
    """A corpus as training and validation windows, and the tokeniser made from the first."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: WindowDataset
    validation: WindowDataset
    validation_bytes: int

    @property
    def vocabulary(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))


def language_modelling(
    data: str | Path | Corpus,
    *,
    tokenizer: str | Path = "bytes",
    length: int = 256,
    fraction: float = 0.9,
) -> LanguageModelling:
    """Reads and splits `data`, makes the tokeniser from the training part, packs both parts.

    `validation_bytes` is the number of UTF-8 bytes that the scored validation tokens stand for.
    Raises `DataError` for unusable data, or a training part shorter than `length` tokens.
    """
    corpus = data if isinstance(data, Corpus) else read_text(data)
    training, held_out = split_text(corpus, fraction)
    made = tokenizer_from(tokenizer, training)
    eos, pad = special_id(made, EOS), special_id(made, PAD)
    train: Packed = pack(encode(made, training.documents), length, eos=eos)
    validation = pack(encode(made, held_out.documents), length, eos=eos, pad=pad)
    return LanguageModelling(
        corpus=corpus,
        tokenizer=made,
        train=WindowDataset(train),
        validation=WindowDataset(validation),
        validation_bytes=validation.scored_bytes(token_bytes(made)),
    )
