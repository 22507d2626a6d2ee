"""Text that continues a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seqmix.core.errors import DataError, RangeError
from seqmix.models.pretrained import load_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel | str | Path,
    prompt: str,
    *,
    new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stream: Callable[[str], object] | None = None,
) -> str:
    """The prompt and its continuation by at most `new_tokens` tokens.

    Takes the likeliest token each time, or with `beams` the likeliest sequence that a beam search finds;
    with `temperature`, `top_k` or `top_p` it samples, the same for the same `seed`. `stream` is called with
    each new piece of text as it comes.

    Raises:
        RangeError: for a number out of range. DataError: for an empty prompt. CheckpointError: for a
        model that cannot be loaded.
    """
    _check(new_tokens=new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, beams=beams)
    if isinstance(model, str | Path):
        model, own = load_language_model(model)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise DataError("The model comes without a tokenizer. Give one as `tokenizer`.")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not inputs["input_ids"].numel():
        raise DataError("The prompt is empty. Give at least one character to continue.")
    if stream is not None and beams > 1:
        raise RangeError(
            f"beams={beams}: a beam search has no text before its end. Leave out stream."
        )
    sampled = any(value is not None for value in (temperature, top_k, top_p))
    options: dict[str, Any] = {"do_sample": sampled, "num_beams": beams}
    if sampled:
        options |= {"temperature": temperature or 1.0, "top_k": top_k or 0, "top_p": top_p or 1.0}
    pad = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            streamer=None if stream is None else _Pieces(tokenizer, stream),
            **options,
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    return prompt + tokenizer.decode(new, skip_special_tokens=True)


def _check(
    *,
    new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    beams: int,
) -> None:
    for name, value in (("new_tokens", new_tokens), ("beams", beams), ("top_k", top_k)):
        if value is not None and value < 1:
            raise RangeError(f"{name}={value}, wanted at least 1.")
    if temperature is not None and temperature <= 0:
        raise RangeError(
            f"temperature={temperature}, wanted more than 0. Leave it out for the likeliest token."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise RangeError(f"top_p={top_p}, wanted a share of probability in (0, 1].")


class _Pieces:
    """Receives token ids from `generate` and passes text on as soon as it is whole characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: Callable[[str], object]) -> None:
        self.tokenizer = tokenizer
        self.stream = stream
        self.ids: list[int] = []
        self.shown = 0
        self.has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self.has_prompt:  # the first call brings the prompt
            self.has_prompt = True
            return
        self.ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\ufffd"):  # the bytes of a character are still coming
            self._show(text)

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.stream(text[self.shown :])
            self.shown = len(text)
