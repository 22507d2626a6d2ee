"""Texts with labelled mentions: sentences of the Python documentation and what they name.

Its authors mark every function, class, method, module and exception that they mention; here the marks are taken off
the text and become labels, so this is a real corpus of named things, of five kinds, labelled by hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seqmix.core.errors import DataError

KINDS = {
    "func": "function",
    "meth": "method",
    "class": "class",
    "mod": "module",
    "exc": "exception",
}
WORD = re.compile(r"[\w.]*\w|[^\w\s]")
NAME = re.compile(r"\w+(\.\w+)*")
SHORTEST, LONGEST, MOST = 6, 24, 6  # words of a sentence, mentions in one


@dataclass(frozen=True)
class Sentence:
    """Words, and for each the label of what it names, or None."""

    text: str
    words: tuple[str, ...]
    labels: tuple[str | None, ...]

    def mentions(self) -> list[tuple[str, str]]:
        """The labels and words of what is named, in order."""
        pairs = zip(self.labels, self.words, strict=True)
        return [(label, word) for label, word in pairs if label is not None]


def read_sentences(documents: Iterable[str]) -> list[Sentence]:
    """The sentences of reStructuredText that mention something, in order, without repetitions.

    Raises `DataError` where there are none.
    """
    found: dict[str, Sentence] = {}
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            if paragraph.lstrip().startswith(".. ") or "::" in paragraph:
                continue  # a directive, or code
            for text in re.split(r"(?<=[.:]) +(?=[A-Z:`*])", " ".join(paragraph.split())):
                if (sentence := _sentence(text)) is not None:
                    found.setdefault(sentence.text, sentence)
    if not found:
        raise DataError(
            "read_sentences: no sentence mentions a function, class, method, module or exception."
        )
    return list(found.values())


def _sentence(text: str) -> Sentence | None:
    """The sentence without its marks; None if it mentions nothing, or something that is not one word."""
    words: list[str] = []
    labels: list[str | None] = []
    plain = ""
    for part in re.split(r"(:\w+:`[^`]*`)", re.sub(r"^[-*#] +", "", text)):
        label = None
        if marked := re.fullmatch(r":(\w+):`([^`]*)`", part):
            role, name = marked.groups()
            part = name.split(".")[-1] if name.startswith("~") else name.lstrip("!.")
            label = KINDS.get(role)
            if label is not None and not NAME.fullmatch(part):
                return None
        else:
            part = re.sub(r"``|\*+|`_?|\\", "", part)
        inside = WORD.findall(part)
        if inside and label is not None and plain and plain[-1].isalnum():
            return None  # part of a word
        words += inside
        labels += [label] * len(inside)
        plain += part
    fits = SHORTEST <= len(words) <= LONGEST and 1 <= sum(map(bool, labels)) <= MOST
    whole = tuple(WORD.findall(plain)) == tuple(words)
    return Sentence(plain.strip(), tuple(words), tuple(labels)) if fits and whole else None


def f1(
    found: Sequence[Sequence[tuple[str, str]]], wanted: Sequence[Sequence[tuple[str, str]]]
) -> float:
    """2 common / (found + wanted) over all sentences: a mention counts with its label, as often as it is there."""
    pairs = [(Counter(a), Counter(b)) for a, b in zip(found, wanted, strict=True)]
    common = sum((a & b).total() for a, b in pairs)
    total = sum(a.total() + b.total() for a, b in pairs)
    return 2 * common / total if total else 1.0
