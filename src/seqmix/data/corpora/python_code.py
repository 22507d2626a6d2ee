"""The source of Python's standard library: always present, different for each version."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from seqmix.data.corpora._asset import CorpusAsset

# Installed packages are not the standard library; tests hold deliberately damaged files.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class StandardLibrary:
    """The folder of the running Python's own modules."""

    def find(self) -> Path | None:
        return Path(sysconfig.get_paths()["stdlib"])

    def how_to_get(self) -> str:
        return "install a Python that comes with the source of its standard library"


def read(folder: Path) -> list[str]:
    """One document per module, by path; modules in another encoding than UTF-8 are left out."""
    documents = []
    for path in sorted(folder.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(folder).parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                documents.append(text)
    return documents


CORPUS = CorpusAsset(
    title="The Python standard library",
    licence="PSF-2.0",
    place=StandardLibrary(),
    read=read,
)
