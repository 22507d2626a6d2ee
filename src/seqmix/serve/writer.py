"""Tokens to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Writer:
    """The text of one answer. `is_stopped` says that a stop string came; the text ends before it."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._tokens: list[int] = []
        self._before = self._shown = (
            0  # tokens whose text is known; between the two lies the last piece
        )
        self._held = ""  # what may be the beginning of a stop string
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now, maybe none."""
        self._tokens.append(token)
        return self._certain(self._new_text(is_last=False))

    def end(self) -> str:
        """What was still held back."""
        text = self._certain(self._new_text(is_last=True))
        held, self._held = self._held, ""
        return text if self.is_stopped else text + held

    def _new_text(self, *, is_last: bool) -> str:
        # A token is decoded together with those before it: some tokenisers write it differently at the start.
        known = self._decode(self._tokens[self._before : self._shown])
        text = self._decode(self._tokens[self._before :])
        if len(text) <= len(known) or (text.endswith("\ufffd") and not is_last):
            return ""  # the bytes of a character are still coming
        self._before, self._shown = self._shown, len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _certain(self, new: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
