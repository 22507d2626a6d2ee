"""Byte and byte-level BPE tokenisers: any UTF-8 text comes back exactly as it went in.

Both have the two special tokens `<eos>` and `<pad>` as their last ids. They are
`tokenizers.Tokenizer`s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seqmix.core import extras
from seqmix.core.errors import DataError, RangeError
from seqmix.core.files import write_text
from seqmix.data.text import Corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS = "<eos>"
PAD = "<pad>"
SMALLEST_VOCABULARY = 258  # 256 bytes and the two special tokens
PIECE = 1 << 20  # characters encoded at a time, which bounds the memory


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 onwards
    (the table that GPT-2 introduced).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """256 bytes, whose ids are their values, then `<eos>` (256) and `<pad>` (257)."""
    tokenizers = extras.require("tokenizers", extra="train")
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    return _finished(
        tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])), use_regex=False
    )


def train_bpe(texts: Iterable[str], *, vocabulary: int) -> Tokenizer:
    """A byte-level BPE with at most `vocabulary` ids, `<eos>` and `<pad>` included.

    It has fewer ids where the texts have no more pairs to merge. The same texts give the same
    tokeniser.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise RangeError(
            f"train_bpe: vocabulary={vocabulary}, wanted at least {SMALLEST_VOCABULARY} "
            "(256 bytes and two special tokens)."
        )
    tokenizers = extras.require("tokenizers", extra="train")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        min_frequency=2,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in _pieces(text))
    tokenizer.train_from_iterator(pieces, trainer)
    return _finished(tokenizer, use_regex=True)


def _finished(tokenizer: Tokenizer, *, use_regex: bool) -> Tokenizer:
    tokenizers = extras.require("tokenizers", extra="train")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=use_regex
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, PAD])
    # A text that happens to contain "<eos>" must not end there.
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` loads too."""
    folder = Path(folder)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return folder


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokeniser of a folder that holds `tokenizer.json`, as every saved model does."""
    tokenizers = extras.require("tokenizers", extra="train")
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{folder} has no tokenizer.json. Give the folder of a saved model or tokeniser, "
            "or write `bytes` or `bpe:4096`."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a file that does not parse
        raise DataError(f"{path} is not a tokeniser ({error}). Save it again.") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_from(spec: str | Path, corpus: Corpus) -> Tokenizer:
    """`bytes`, `bpe:VOCABULARY` trained on `corpus`, or a folder with `tokenizer.json`."""
    name = str(spec)
    if name == "bytes":
        return byte_tokenizer()
    kind, _, size = name.partition(":")
    if kind == "bpe" and not Path(name).is_dir():
        if not size.isdecimal():
            raise DataError(f"{name!r} does not parse. Give the vocabulary, such as bpe:4096.")
        return train_bpe(corpus.documents, vocabulary=int(size))
    if not Path(name).is_dir():
        raise DataError(
            f"There is no tokeniser {name!r}. Wanted `bytes`, `bpe:4096`, or a folder with "
            "tokenizer.json."
        )
    return load_tokenizer(name)


def special_id(tokenizer: Tokenizer, token: str = EOS) -> int:
    """The id of `<eos>` or `<pad>`; raises `DataError` where the tokeniser has others."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise DataError(
            f"The tokeniser has no {token} token. Give the id of its own special token instead."
        )
    return int(found)


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> list[np.ndarray]:
    """The ids of each document, int32, with no special tokens added."""
    # Only where tokens are bytes is it certain that a cut before a line end changes no token.
    divisible = _is_byte_level(tokenizer)
    encoded = []
    for document in documents:
        pieces = _pieces(document) if divisible else [document]
        ids = [
            np.asarray(tokenizer.encode(piece, add_special_tokens=False).ids, dtype=np.int32)
            for piece in pieces
        ]
        encoded.append(np.concatenate(ids))
    return encoded


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many UTF-8 bytes of text each id stands for, int64 `[vocabulary]`; special tokens are 0.

    Raises `DataError` for a tokeniser that is not byte-level: there the bytes of one token are not
    defined.
    """
    if not _is_byte_level(tokenizer):
        raise DataError(
            "Bits per byte need a byte-level tokeniser, and this one is not. Use the perplexity "
            "per token, or train with `bytes` or `bpe:4096`."
        )
    counts = np.zeros(tokenizer.get_vocab_size(with_added_tokens=True), dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        counts[index] = len(token)  # one character per byte
    for index, added in tokenizer.get_added_tokens_decoder().items():
        counts[index] = 0 if added.special else len(added.content.encode("utf-8"))
    return counts


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    tokenizers = extras.require("tokenizers", extra="train")
    return isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)


def _pieces(text: str) -> Iterable[str]:
    """Cuts before the first of a run of line ends, where a byte-level word always begins."""
    start = 0
    while len(text) - start > PIECE:
        end = start + PIECE
        while (end := text.find("\n", end)) >= 0 and text[end - 1].isspace():
            end += 1
        if end < 0:
            break
        yield text[start:end]
        start = end
    yield text[start:]
