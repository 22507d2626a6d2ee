"""The documentation of Linux 6.1: about 2,800 documents in English."""

from __future__ import annotations

import gzip
from pathlib import Path

from seqmix.data.corpora._asset import CorpusAsset, DebianPackage


def read(folder: Path) -> list[str]:
    """One document per file, by path; the translations of the English pages are left out."""
    return [
        gzip.decompress(path.read_bytes()).decode("utf-8")
        for path in sorted(folder.rglob("*.rst.gz"))
        if "translations" not in path.relative_to(folder).parts
    ]


CORPUS = CorpusAsset(
    title="The Linux documentation",
    licence="GPL-2.0",
    place=DebianPackage(
        package="linux-doc-6.1", folder="usr/share/doc/linux-doc-6.1/Documentation"
    ),
    read=read,
)
