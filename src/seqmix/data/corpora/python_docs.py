"""The documentation of Python 3.11: about 500 documents, 11 MB of reStructuredText."""

from __future__ import annotations

from pathlib import Path

from seqmix.data.corpora._asset import CorpusAsset, DebianPackage


def read(folder: Path) -> list[str]:
    """One document per page, by path."""
    return [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.rst.txt"))]


CORPUS = CorpusAsset(
    title="The Python documentation",
    licence="PSF-2.0",
    place=DebianPackage(package="python3.11-doc", folder="usr/share/doc/python3.11/html/_sources"),
    read=read,
)
