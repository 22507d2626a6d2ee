"""Text that continues a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seqmix.core.errors import DataError, RangeError
from seqmix.generate._method import Continuation, Method, Task
from seqmix.generate._reader import reader_of
from seqmix.generate.beams import Beams
from seqmix.generate.constrained import Language
from seqmix.generate.diverse_beams import DiverseBeams
from seqmix.generate.planning import Planning
from seqmix.generate.sampling import GREEDY, Sampling
from seqmix.models.pretrained import load_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """A continuation: its text without the prompt, its tokens and their log-probability in nats.

    `is_ended` is false of a text that was cut off after `new_tokens`.
    """

    text: str
    ids: list[int]
    log_probability: float
    is_ended: bool


def generate(
    model: PreTrainedModel | str | Path,
    prompt: str,
    *,
    new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    method: Method | None = None,
    constraint: Language | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stream: Callable[[str], object] | None = None,
) -> str:
    """The prompt and its continuation by at most `new_tokens` tokens.

    Takes the likeliest token each time; with `temperature`, `top_k` or `top_p` it samples, the same for the same
    `seed`. `method` is any other way to decode: `Sampling` with all its options, `Beams`, `DiverseBeams`,
    `Contrastive`. `constraint` keeps the text to a language:
    a `Pattern`, a `JsonSchema` or a `Choice`. The text ends before the first of the strings `stop`.
    `stream` is called with each new piece of text as it comes.

    Raises:
        RangeError: for a number out of range. DataError: for an empty prompt, or a constraint that fits no text.
        CheckpointError: for a model that cannot be loaded.
    """
    if any(value is not None for value in (temperature, top_k, top_p)):
        if method is not None:
            raise RangeError(
                "method goes without temperature, top_k and top_p, which are options of Sampling."
            )
        method = Sampling(
            temperature=1.0 if temperature is None else temperature,
            top_k=top_k,
            top_p=1.0 if top_p is None else top_p,
        )
    texts = generate_texts(
        model,
        prompt,
        new_tokens=new_tokens,
        method=method,
        constraint=constraint,
        stop=stop,
        seed=seed,
        tokenizer=tokenizer,
        stream=stream,
    )
    return prompt + texts[0].text


def generate_texts(
    model: PreTrainedModel | str | Path,
    prompt: str,
    *,
    texts: int = 1,
    new_tokens: int = 64,
    method: Method | None = None,
    constraint: Language | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stream: Callable[[str], object] | None = None,
) -> list[Text]:
    """Continuations of a prompt, the best first: as many samples, or at most as many beams, as `texts`.

    Arguments and errors are those of `generate`.
    """
    method = method or GREEDY
    if stream is not None and (texts > 1 or isinstance(method, Beams | DiverseBeams | Planning)):
        raise RangeError("stream: only a single text without a search can be shown before its end.")
    if not all(stop):
        raise RangeError("stop: an empty string ends every text. Leave it out.")
    if isinstance(model, str | Path):
        model, own = load_language_model(model)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise DataError("The model comes without a tokenizer. Give one as `tokenizer`.")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].numel():
        raise DataError("The prompt is empty. Give at least one character to continue.")
    pieces = None if stream is None else _Pieces(tokenizer, stop, stream)
    task = Task(
        prompt=inputs["input_ids"],
        new_tokens=new_tokens,
        ends=end_tokens(model),
        stop=_stopping(tokenizer, stop) if stop else None,
        texts=texts,
        seed=seed,
        constraint=None if constraint is None else constraint.constraint(tokenizer),
        emit=None if pieces is None else pieces.put,
    )
    with torch.inference_mode():
        found = method.decode(reader_of(model), task)
    if not found:
        raise DataError("There is no text that the constraint allows after this prompt.")
    if pieces is not None:
        pieces.end()
    return [_text(tokenizer, stop, continuation) for continuation in found]


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end a text of the model."""
    configured = getattr(model, "generation_config", None) or model.config
    ends = configured.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def _text(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], found: Continuation) -> Text:
    text, _ = _cut(tokenizer.decode(found.ids, skip_special_tokens=True), stop)
    return Text(text, found.ids, found.log_probability, found.is_ended)


def _cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop strings, and whether there was one."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _stopping(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]
) -> Callable[[list[int]], bool]:
    # A token has a byte at least, but for special ones; a character that is cut into adds three.
    tail = 2 * max(len(each.encode()) for each in stop) + 8

    def is_stopped(ids: list[int]) -> bool:
        return _cut(tokenizer.decode(ids[-tail:], skip_special_tokens=True), stop)[1]

    return is_stopped


class _Pieces:
    """Receives tokens and passes text on as soon as it is whole characters and cannot be part of a stop string."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        stream: Callable[[str], object],
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.stream = stream
        self.ids: list[int] = []
        self.shown = 0

    def put(self, token: int) -> None:
        self.ids.append(token)
        text = self._text()
        if not text.endswith("\ufffd"):  # the bytes of a character are still coming
            self._show(text[: len(text) - self._held_back(text)])

    def end(self) -> None:
        self._show(self._text())

    def _held_back(self, text: str) -> int:
        """Characters at the end with which a stop string may begin."""
        counts = (n for each in self.stop for n in range(1, len(each)) if text.endswith(each[:n]))
        return max(counts, default=0)

    def _text(self) -> str:
        return _cut(self.tokenizer.decode(self.ids, skip_special_tokens=True), self.stop)[0]

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.stream(text[self.shown :])
            self.shown = len(text)
