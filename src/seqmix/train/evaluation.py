"""How well a language model predicts a text: perplexity, and bits per byte, which compare tokenisers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from seqmix.core.errors import ConfigError, DataError, NumericalError, RangeError
from seqmix.data.packing import IGNORED, pack
from seqmix.data.text import Corpus, read_text
from seqmix.data.tokenizer import encode, token_bytes
from seqmix.models.hf import SeqmixForCausalLM, StateCache
from seqmix.models.pretrained import load_language_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS = 2**22  # logits computed at a time, which bounds the memory (float32: 16 MB)


def evaluate(
    model: PreTrainedModel | str | Path,
    data: str | Path | Corpus,
    *,
    length: int = 1024,
    tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    carry: bool = False,
    progress: bool = True,
) -> dict[str, float]:
    """The loss of `model` on every token of `data` that follows another of its document.

    The ends of documents are read and not scored, so that models with different end tokens compare.
    The text is read in windows of `length` tokens that each start afresh, the same for every model. With
    `carry`, the state of a seqmix model goes on from window to window instead, through the whole document:
    what streaming would give, far beyond the length that the model may have been trained at.

    With `tokens`, only as many windows as hold about so many tokens are scored, evenly spread over the text:
    the estimate of a long text in less time. Every window is scored where the tokeniser is not byte-level,
    for then the bytes of single windows are not defined.

    Returns:
        loss (nats per token), perplexity = exp(loss), bits_per_byte = sum of the losses / log(2) / bytes,
        tokens (how many were scored), bytes (the UTF-8 bytes that these stand for), text_tokens (how many
        the text has to score).

    Raises:
        ConfigError, RangeError: for a `length` or `tokens` that is out of range, or tokens with carry.
        DataError, CheckpointError: for unusable data or an unusable model.
    """
    if tokens is not None and tokens < 1:
        raise RangeError(f"tokens={tokens}, wanted at least 1, or None for the whole text.")
    if tokens is not None and carry:
        raise ConfigError("tokens: carry reads the whole text. Leave out one of the two.")
    corpus = data if isinstance(data, Corpus) else read_text(data)
    if isinstance(model, str | Path):
        model, own = load_language_model(model)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise DataError("The model comes without a tokenizer. Give one as `tokenizer`.")
    backend = backend_of(tokenizer)
    eos = end_of_text(tokenizer)
    documents = encode(backend, corpus.documents)
    held_out = HeldOut(documents, corpus.documents, backend, length, eos, limit=tokens)
    text_tokens = sum(len(document) - 1 for document in documents)
    if carry:
        total, count = _carried(model, documents, length, progress=progress)
        return _result(total, count, held_out.bytes) | {"text_tokens": text_tokens}
    return held_out.evaluate(model, progress=progress) | {"text_tokens": text_tokens}


class HeldOut:
    """Text in windows of `length` tokens, and the UTF-8 bytes that its scored tokens stand for.

    With `limit`, only as many windows as hold about so many tokens, evenly spread over the text; all of them
    where the tokeniser is not byte-level, for then the bytes of single windows are not defined.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        texts: Sequence[str],
        backend: Tokenizer,
        length: int,
        eos: int,
        *,
        limit: int | None = None,
    ) -> None:
        self.packed = pack(documents, length, eos=eos, pad=eos)
        self._eos = eos
        windows = self.packed.windows
        try:
            sizes = token_bytes(backend)
        except DataError:
            # All tokens but the first of each document are scored, and offsets tell where that ends.
            self.windows = np.arange(windows)
            self.bytes = sum(_bytes_after_first_token(backend, text) for text in texts)
            return
        chosen = windows if limit is None else min(windows, max(1, limit // length))
        self.windows = np.linspace(0, windows - 1, chosen).round().astype(np.int64)
        labels = self._batch(self.windows)["labels"]
        self.bytes = int(sizes[labels[labels != IGNORED].numpy()].sum())

    def _batch(self, windows: np.ndarray) -> dict[str, Tensor]:
        batch = self.packed.batch(windows)
        labels = batch["labels"]
        return batch | {"labels": labels.masked_fill(labels == self._eos, IGNORED)}

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel, *, progress: bool = False) -> dict[str, float]:
        """What `seqmix.train.evaluate` returns, over these windows."""
        model.eval()
        rows = max(1, LOGITS // (self.packed.length * model.config.vocab_size))
        total, count = 0.0, 0
        for start in _track(range(0, len(self.windows), rows), shown=progress):
            batch = self._batch(self.windows[start : start + rows])
            inputs = {"input_ids": batch["input_ids"].to(model.device)}
            if takes_segments(model):
                inputs["segments"] = batch["segments"].to(model.device)
            logits = model(**inputs, use_cache=False).logits
            total += _loss_sum(logits[:, :-1], batch["labels"][:, 1:])
            count += int((batch["labels"] != IGNORED).sum())
        return _result(total, count, self.bytes)


def takes_segments(model: Any) -> bool:
    """Whether this is a seqmix model, perhaps inside an adapter of peft."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return isinstance(base, SeqmixForCausalLM)


def _bytes_after_first_token(backend: Tokenizer, text: str) -> int:
    end = backend.encode(text[:1000], add_special_tokens=False).offsets[0][1]
    return len(text[end:].encode("utf-8"))


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the `tokenizers.Tokenizer` inside, that reads `<eos>` in a text as five characters."""
    inside = getattr(tokenizer, "backend_tokenizer", None)
    if inside is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} is a slow tokeniser. Load a fast one (tokenizer.json)."
        )
    backend = type(inside).from_str(inside.to_str())
    backend.encode_special_tokens = True
    return backend


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document; raises `DataError` where the tokeniser has none."""
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no eos_token, which ends a document. Set it.")
    return int(tokenizer.eos_token_id)


@torch.no_grad()
def _carried(
    model: PreTrainedModel,
    documents: Sequence[np.ndarray],
    length: int,
    *,
    progress: bool,
) -> tuple[float, int]:
    if not takes_segments(model):
        raise ConfigError("carry: only seqmix models carry their state. Leave it out for others.")
    model.eval()
    total, count = 0.0, 0
    for document in _track(documents, shown=progress):
        ids = torch.from_numpy(document).long().to(model.device)[None]
        cache = StateCache()
        for start in range(0, ids.shape[1] - 1, length):
            labels = ids[:, start + 1 : start + 1 + length]
            logits = model(
                ids[:, start : start + labels.shape[1]], past_key_values=cache, use_cache=True
            ).logits
            total += _loss_sum(logits, labels)
            count += labels.numel()
    return total, count


def _loss_sum(logits: Tensor, labels: Tensor) -> float:
    """The sum over scored labels, added up in float64."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten().to(logits.device),
        ignore_index=IGNORED,
        reduction="none",
    )
    return float(losses.double().sum())


def _result(total: float, tokens: int, scored: int) -> dict[str, float]:
    if not tokens:
        raise DataError(
            "The text has no token that follows another, so none to score. Give a longer one."
        )
    loss = total / tokens
    if not math.isfinite(loss):
        raise NumericalError(f"The loss of the evaluation is {loss}: the model is not usable.")
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / scored,
        "tokens": tokens,
        "bytes": scored,
    }


def _track(items: Sequence[Any], *, shown: bool) -> Any:
    bar = Progress(console=Console(stderr=True), disable=not shown, transient=True)
    with bar:
        yield from bar.track(items, description="evaluating")
