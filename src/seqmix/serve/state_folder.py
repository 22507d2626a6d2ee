"""States in files, so that a server that starts again goes on where it was.

A file is a safetensors file (nothing in it is ever run), written under a temporary name and moved. Its name is the
SHA-256 of the model and the tokens that the state has read, so nothing of another model or text is ever taken for it,
and no name comes from a client. Its tensors have a SHA-256 of their own.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import seqmix
from seqmix.core.errors import CheckpointError
from seqmix.core.state import State, leaves, load_state, read_note, save_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = re.compile(r"[0-9a-f]{64}\.safetensors").fullmatch
BESIDES = ("_name_or_path", "architectures", "dtype", "transformers_version")  # say nothing more
LEFT_OVER = re.compile(r"\.[0-9a-f]{64}\.safetensors\..+").fullmatch  # of a write that was cut off


@dataclass(frozen=True)
class Kept:
    """A state in the folder: of these tokens, as what it has beyond that of the first `parent` ones."""

    tokens: tuple[int, ...]
    parent: int
    bytes: int
    written: float  # a time


class StateFolder:
    """The states of one model in a folder, which nobody else may write to."""

    def __init__(self, folder: str | Path, model: str, limit: int) -> None:
        self.folder = Path(folder) / model[:16]
        self.limit = limit  # bytes, kept to by the one who writes
        self._model = model
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def survey(self) -> Iterator[Kept]:
        """All states. What is no state of this model is left alone, with a warning; what a crash left is removed."""
        for path in sorted(self.folder.iterdir()):
            if LEFT_OVER(path.name):
                path.unlink(missing_ok=True)
                continue
            try:
                kept = self._describe(path)
            except (CheckpointError, OSError, ValueError, TypeError, KeyError) as error:
                warnings.warn(f"{path} is not used: {error}", stacklevel=2)
            else:
                yield kept

    def write(self, tokens: Sequence[int], parent: int, addition: State) -> int:
        """Keeps a state; returns the bytes of its file, 0 if it cannot be written, of which it warns."""
        note = {
            "tokens": json.dumps(list(tokens)),
            "parent": str(parent),
            "sha256": digest(addition),
        }
        try:
            return save_state(addition, self._path(tokens), note=note).stat().st_size
        except OSError as error:
            warnings.warn(f"A state is not kept: {error}", stacklevel=2)
            return 0

    def read(self, tokens: Sequence[int]) -> State:
        """The state after these tokens, beyond its parent; None if it is gone or damaged, of which it warns."""
        path = self._path(tokens)
        try:
            addition = load_state(path)
            if read_note(path).get("sha256") != digest(addition):
                raise CheckpointError(f"{path} is damaged.")
            path.touch()
        except (CheckpointError, OSError) as error:
            warnings.warn(f"A kept state is not used: {error}", stacklevel=2)
            return None
        return addition

    def remove(self, tokens: Sequence[int]) -> None:
        """Deletes a state."""
        self._path(tokens).unlink(missing_ok=True)

    def _path(self, tokens: Sequence[int]) -> Path:
        text = json.dumps([self._model, *tokens])
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _describe(self, path: Path) -> Kept:
        if not NAME(path.name) or path.is_symlink() or not path.is_file():
            raise CheckpointError("it is no state of a text.")
        note = read_note(path)
        tokens, parent = tuple(map(int, json.loads(note["tokens"]))), int(note["parent"])
        if self._path(tokens) != path or not 0 <= parent < len(tokens):
            raise CheckpointError("it is the state of another model or text.")
        about = path.stat()
        return Kept(tokens, parent, about.st_size, about.st_mtime)


def digest(state: State) -> str:
    """SHA-256 of the tensors of a state."""
    found = hashlib.sha256()
    for leaf in leaves(state):
        found.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
        found.update(leaf.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all that a model's states depend on: its configuration, its weights and this package's version."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in BESIDES}
    found = hashlib.sha256(f"{seqmix.__version__} {type(model).__name__}".encode())
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        found.update(f"{name} {digest(value) if isinstance(value, Tensor) else value}".encode())
    return found.hexdigest()
