"""Translated sentences: the messages of Django in about a hundred languages, and how near translations are."""

from __future__ import annotations

import statistics
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from seqmix.core.errors import DataError
from seqmix.data.corpora import PythonPackage

PLACE = PythonPackage(requirement="Django==5.2.19", module="django", folder="")  # BSD-3-Clause
MAGIC = 0x950412DE  # of a compiled catalogue of messages, little-endian
CONTEXT, PLURAL = "\4", "\0"
ORDERS, RECALL = range(1, 7), 2.0  # of chrF: lengths of n-grams, and how much more recall counts


def read_messages(language: str, folder: Path | None = None) -> dict[str, str]:
    """English messages of one line and their translations into a language such as `fr` or `pt_BR`, sorted.

    Raises `DataError` with the command that fetches them where they are absent, and for an unknown language.
    """
    folder = folder or PLACE.find()
    if folder is None:
        raise DataError(
            f"The messages of Django are not on this machine. Get them with:\n  {PLACE.how_to_get()}"
        )
    files = sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/django.mo"))
    if not files:
        raise DataError(
            f"read_messages: language={language!r} has no messages, wanted one such as 'fr'."
        )
    found: dict[str, str] = {}
    for file in files:
        found |= _catalogue(file.read_bytes())
    return dict(sorted(found.items()))


def _catalogue(content: bytes) -> dict[str, str]:
    """The messages of a compiled catalogue without context and plural: two tables of lengths and places of texts."""
    magic, _, count, *tables = struct.unpack_from("<5I", content)
    if magic != MAGIC:
        raise DataError("read_messages: a file is no catalogue of messages. Get the package again.")
    sides = []
    for table in tables:
        entries = struct.iter_unpack("<2I", content[table : table + 8 * count])
        sides.append([content[start : start + size].decode() for size, start in entries])
    return {
        message: translation
        for message, translation in zip(*sides, strict=True)
        if message and not any(each in message + translation for each in (CONTEXT, PLURAL, "\n"))
    }


def chrf(found: Sequence[str], wanted: Sequence[str]) -> float:
    """How near translations are to those wanted, 0 to 100: n-grams of characters that they have in common.

        F = 5 P R / (4 P + R),    P = mean over n = 1 to 6 of common / found,    R = the same of common / wanted

    of all texts together, blanks left out, and of the n that both sides have. Popovic 2015, chrF2.
    """
    precision: list[float] = []
    recall: list[float] = []
    for n in ORDERS:
        ours, theirs = ([_grams(text, n) for text in side] for side in (found, wanted))
        common = sum((a & b).total() for a, b in zip(ours, theirs, strict=True))
        sizes = [sum(each.total() for each in side) for side in (ours, theirs)]
        if all(sizes):
            precision.append(common / sizes[0])
            recall.append(common / sizes[1])
    if not any(precision):
        return 0.0
    p, r = statistics.fmean(precision), statistics.fmean(recall)
    return 100 * (1 + RECALL**2) * p * r / (RECALL**2 * p + r)


def _grams(text: str, n: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[i : i + n] for i in range(len(letters) - n + 1))
