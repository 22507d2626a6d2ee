"""Text: reading it, splitting it, turning it into tokens, and packing tokens into windows."""

from seqmix.data.corpora import CORPORA
from seqmix.data.language_modelling import LanguageModelling, language_modelling
from seqmix.data.packing import Packed, WindowDataset, cu_seqlens_from_segments, pack
from seqmix.data.text import Corpus, read_text, split_text
from seqmix.data.tokenizer import (
    byte_tokenizer,
    encode,
    load_tokenizer,
    save_tokenizer,
    special_id,
    token_bytes,
    tokenizer_from,
    train_bpe,
)

__all__ = [
    "CORPORA",
    "Corpus",
    "LanguageModelling",
    "Packed",
    "WindowDataset",
    "byte_tokenizer",
    "cu_seqlens_from_segments",
    "encode",
    "language_modelling",
    "load_tokenizer",
    "pack",
    "read_text",
    "save_tokenizer",
    "special_id",
    "split_text",
    "token_bytes",
    "tokenizer_from",
    "train_bpe",
]
