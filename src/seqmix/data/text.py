"""Texts from files, folders, named corpora and `datasets`, and their split into parts."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from seqmix.core import extras
from seqmix.core.errors import DataError
from seqmix.data.corpora import CORPORA


@dataclass(frozen=True)
class Corpus:
    """A named sequence of documents; `left_out` names the files of a folder that are not text."""

    name: str
    documents: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the documents and where each ends, in hexadecimal."""
        digest = hashlib.sha256()
        for document in self.documents:
            content = document.encode("utf-8")
            digest.update(len(content).to_bytes(8, "big"))
            digest.update(content)
        return digest.hexdigest()

    @cached_property
    def characters(self) -> int:
        return sum(len(document) for document in self.documents)

    @cached_property
    def bytes(self) -> int:
        """The size as UTF-8."""
        return sum(len(document.encode("utf-8")) for document in self.documents)


def read_text(data: str | Path) -> Corpus:
    """The corpus that `data` names.

    In this order: a file (one document); a folder (one document per text file at any depth, by
    path, hidden files aside); `datasets:NAME[:split[:column]]` from the Hugging Face hub; a corpus
    of `seqmix.data.corpora` such as `shakespeare`. A `Path` is only ever a file or a folder.

    Raises `DataError` where nothing of that name exists, or it is empty, binary or not UTF-8.
    """
    path = Path(data)
    name = str(data)
    if not name.strip():
        raise DataError("The data argument is empty. Give a text file, a folder or a corpus name.")
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.exists():
            return Corpus(path.stem, (_decode(path, _contents(path)),))
    except OSError as error:
        raise DataError(f"{name[:200]} cannot be read: {error.strerror}.") from error
    if isinstance(data, str):
        if data.startswith("datasets:"):
            return _read_dataset(data)
        if data in CORPORA:
            return Corpus(data.replace("-", "_"), tuple(CORPORA.get(data).documents()))
    raise DataError(_missing(name))


def split_text(corpus: Corpus, fraction: float | Sequence[float] = 0.9) -> tuple[Corpus, ...]:
    """Contiguous parts in the corpus's own order: training and the rest, or more.

    `fraction` is the share of characters of every part but the last: 0.9 gives training and
    validation, (0.8, 0.1) gives training, validation and test. Several documents are cut at the
    document boundary that is nearest; one document at the nearest line end, or between two
    characters where the next line end is further away than a twentieth of the text. Raises
    `DataError` for shares that leave nothing
    for a part.
    """
    shares = (fraction,) if isinstance(fraction, int | float) else tuple(fraction)
    if not shares or min(shares) <= 0 or sum(shares) >= 1:
        raise DataError(
            f"split_text: fraction={fraction!r}, wanted positive shares with a sum below 1: "
            "the last part gets what remains."
        )
    targets = np.array([share * corpus.characters for share in accumulate(shares)])
    if len(corpus.documents) > 1:
        ends = np.cumsum([len(document) for document in corpus.documents])
        cuts = _nearest(ends[:-1], targets, corpus.name) + 1
        bounds = [0, *cuts.tolist(), len(ends)]
        parts = [corpus.documents[start:end] for start, end in pairwise(bounds)]
    else:
        text = corpus.documents[0]
        bounds = [0, *_line_ends(text, targets, corpus.name), len(text)]
        parts = [(text[start:end],) for start, end in pairwise(bounds)]
    names = ("train", "validation", "test") if len(parts) <= 3 else range(1, len(parts) + 1)
    return tuple(
        Corpus(f"{corpus.name}/{name}", part) for name, part in zip(names, parts, strict=False)
    )


def _line_ends(text: str, targets: np.ndarray, name: str) -> list[int]:
    """Where to cut one text: offsets in characters."""
    characters = np.arange(1, len(text))
    lines = np.array([match.end() for match in re.finditer("\n", text)], dtype=np.int64)
    lines = lines[lines < len(text)]
    if len(lines) >= len(targets):
        cuts = lines[_nearest(lines, targets, name)]
        if np.abs(cuts - targets).max() <= len(text) / 20:
            return cuts.tolist()
    return characters[_nearest(characters, targets, name)].tolist()


def _nearest(boundaries: np.ndarray, targets: np.ndarray, name: str) -> np.ndarray:
    """The index of the boundary nearest to each target, all different and ascending."""
    if len(boundaries) < len(targets):
        raise DataError(
            f"{name} can be cut in {len(boundaries)} places, too few for {len(targets) + 1} parts. "
            "Give a longer text."
        )
    chosen: list[int] = []
    for left, target in zip(range(len(targets) - 1, -1, -1), targets, strict=True):
        first = chosen[-1] + 1 if chosen else 0
        allowed = boundaries[first : len(boundaries) - left]
        chosen.append(first + int(np.abs(allowed - target).argmin()))
    return np.array(chosen)


def _contents(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.strip():
        raise DataError(f"{path} is empty. Give a file with text in it.")
    return content


def _decode(path: Path, content: bytes) -> str:
    """UTF-8 without its optional byte-order mark; line ends stay as they are."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{path} is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW.txt"
        )
    if (zero := content.find(0)) >= 0:
        raise DataError(
            f"{path} is binary: byte {zero} is NUL. Give plain text in UTF-8; "
            "extract the text of a document or archive first."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        line = content.count(b"\n", 0, offset) + 1
        raise DataError(
            f"{path} is not UTF-8: byte {offset} (0x{content[offset]:02x}, line {line}) is not "
            "part of a character. If it is Latin-1, convert it: "
            f"iconv -f LATIN1 -t UTF-8 {path} > NEW.txt"
        ) from error


def _read_folder(folder: Path) -> Corpus:
    documents, left_out = [], []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        content = path.read_bytes()
        # Images and archives beside texts are normal; a text in another encoding is a mistake.
        if 0 in content or not content.strip():
            left_out.append(str(inside))
        else:
            documents.append(_decode(path, content))
    if not documents:
        found = f"only binary or empty files, such as {left_out[0]}" if left_out else "no files"
        raise DataError(f"The folder {folder} has no text files: {found}. Put UTF-8 texts there.")
    return Corpus(folder.resolve().name, tuple(documents), tuple(left_out))


def _read_dataset(data: str) -> Corpus:
    """`datasets:NAME[:split[:column]]`, by default the column `text` of the split `train`."""
    name, split, column = (*data.split(":")[1:4], "", "", "")[:3]
    split, column = split or "train", column or "text"
    if not name or data.count(":") > 3:
        raise DataError(f"{data} does not parse. Wanted datasets:NAME[:split[:column]].")
    datasets = extras.require("datasets", extra="data")
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:  # no network, no such data set, no such split
        raise DataError(
            f"{data} cannot be loaded: {error} It needs a network or a filled cache; a text file, "
            f"a folder or one of {', '.join(CORPORA.names())} does not."
        ) from error
    if column not in rows.column_names:
        raise DataError(
            f"{data}: there is no column {column!r}. It has {', '.join(rows.column_names)}: "
            f"write datasets:{name}:{split}:COLUMN."
        )
    documents = [text for text in rows[column] if isinstance(text, str) and text.strip()]
    if not documents:
        raise DataError(f"{data}: the column {column!r} holds no text. Name a column of strings.")
    return Corpus(data, tuple(documents))


def _missing(name: str) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), CORPORA.names(), n=2, cutoff=0.6)
    hint = f" Did you mean the corpus {' or '.join(close)}?" if close else ""
    return (
        f"There is no file, folder or corpus called {name[:200]!r}.{hint} "
        f"Corpora: {', '.join(CORPORA.names())}; or datasets:NAME with a network."
    )
