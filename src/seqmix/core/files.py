"""Outputs appear whole or not at all: they are written under a temporary name and moved."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from seqmix.core.errors import SeqmixError


class OutputError(SeqmixError, OSError):
    """An output cannot be written: a full disk, a read-only folder, or something in the way."""


def cache_folder() -> Path:
    """Where converted models and unpacked corpora are kept: `SEQMIX_CACHE`, else ~/.cache/seqmix."""
    return Path(os.environ.get("SEQMIX_CACHE") or Path.home() / ".cache" / "seqmix")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, SeqmixError):
            raise
        raise OutputError(
            f"Cannot write {path}: {error.strerror or error}. Nothing was changed there. "
            "Free some space or choose another folder, then run the same command again."
        ) from error


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Calls `write(temporary)`, then moves the result to `path`, replacing an earlier output of ours.

    Raises `OutputError` where the disk is full or the folder cannot be written; `path` keeps what it had.
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Writes UTF-8 text to `path` atomically."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an error.

    Raises `OutputError` where `path` already holds something: nothing of the user's is overwritten.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(
            f"{path} exists and is not empty. Choose another folder, or move it away."
        )
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        try:
            yield temporary
            if path.exists():
                path.rmdir()
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
