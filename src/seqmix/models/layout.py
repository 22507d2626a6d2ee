"""The layout language: which mixers a model stacks, and in what order.

    layout  = item {"," item}
    item    = [INTEGER "x"] ( entry | "[" layout "]" )
    entry   = part ["/" part]                     mixer / channel mixer
    part    = NAME ["(" option {"," option} ")"]
    option  = NAME "=" (VALUE | part)             integer, number, true, false, none, a word or a part

Examples: `mamba2`; `3x[gated_delta_net], attention`; `2x[3x[mamba2], attention(window=256)/squared_relu]`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from seqmix.core.errors import LayoutError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
COUNT = re.compile(r"(\d+)\s*x\s*(?=[\[A-Za-z_])")
VALUE = re.compile(r"[A-Za-z0-9_.+-]+")
WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Part:
    """A name with options, such as `attention(window=256)`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        options = ", ".join(f"{key}={_word(value)}" for key, value in self.options.items())
        return f"{self.name}({options})"


@dataclass(frozen=True)
class Entry:
    """One block: its token mixer, and its channel mixer if it names one."""

    mixer: Part
    channel: Part | None = None

    def __str__(self) -> str:
        return str(self.mixer) if self.channel is None else f"{self.mixer}/{self.channel}"


def parse_layout(text: str) -> list[Entry]:
    """The blocks of a layout, repeats written out; raises `LayoutError` with a caret at the fault."""
    reader = _Reader(text)
    entries = reader.layout()
    reader.skip()
    if not reader.at_end():
        reader.fail("expected ',' or the end")
    return entries


def write_layout(entries: Sequence[Entry]) -> str:
    """A layout that parses to these blocks; equal neighbours are counted."""
    runs = [(str(entry), len(list(run))) for entry, run in itertools.groupby(entries)]
    return ", ".join(text if times == 1 else f"{times}x[{text}]" for text, times in runs)


def parse_part(text: str) -> Part:
    """One name with options, e.g. a channel mixer `glu(activation=gelu)`."""
    reader = _Reader(text)
    part = reader.part("a name")
    reader.skip()
    if not reader.at_end():
        reader.fail("expected the end")
    return part


def _word(value: Any) -> str:
    return next((w for w, v in WORDS.items() if v is value), str(value))


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0

    def fail(self, wanted: str, place: int | None = None) -> NoReturn:
        place = self.place if place is None else place
        raise LayoutError(
            f"The layout does not parse at column {place + 1}: {wanted}.\n"
            f"  {self.text}\n  {' ' * place}^"
        )

    def at_end(self) -> bool:
        return self.place >= len(self.text)

    def skip(self) -> None:
        while not self.at_end() and self.text[self.place].isspace():
            self.place += 1

    def take(self, mark: str) -> bool:
        self.skip()
        found = self.text.startswith(mark, self.place)
        self.place += len(mark) * found
        return found

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        self.skip()
        found = pattern.match(self.text, self.place)
        if found:
            self.place = found.end()
        return found

    def layout(self) -> list[Entry]:
        entries = self.item()
        while self.take(","):
            entries += self.item()
        return entries

    def item(self) -> list[Entry]:
        self.skip()
        start = self.place
        found = self.match(COUNT)
        times = int(found[1]) if found else 1
        if times < 1:
            self.fail("expected a count of at least 1", start)
        if self.take("["):
            opened = self.place - 1
            entries = self.layout()
            if not self.take("]"):
                self.fail(f"expected ',' or ']' to close the '[' of column {opened + 1}")
            return entries * times
        mixer = self.part("a mixer name or '['")
        channel = self.part("a channel mixer name") if self.take("/") else None
        return [Entry(mixer, channel)] * times

    def part(self, wanted: str) -> Part:
        name = self.match(NAME)
        if not name:
            self.fail(f"expected {wanted}")
        options: dict[str, Any] = {}
        if self.take("("):
            while True:
                key = self.match(NAME)
                if not key:
                    self.fail("expected an option such as window=256")
                if not self.take("="):
                    self.fail(f"expected '=' after {key[0]}")
                value = self.match(VALUE)
                if not value:
                    self.fail(f"expected a value for {key[0]}")
                options[key[0]] = _value(value[0])
                if self.place < len(self.text) and self.text[self.place] == "(":
                    self.place -= len(value[0])
                    options[key[0]] = str(self.part("a name"))
                if self.take(")"):
                    break
                if not self.take(","):
                    self.fail("expected ',' or ')'")
        return Part(name[0].replace("-", "_"), options)


def _value(word: str) -> Any:
    if word.lower() in WORDS:
        return WORDS[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
