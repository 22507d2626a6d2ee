"""The folder of a run: what it was asked to do, checkpoints while it runs, the model when it is done.

out/run.json             the arguments; the same ones continue the run, others are refused
out/checkpoints/step-N   the newest checkpoint, complete or not there at all
out/config.json, model.safetensors, tokenizer.json, ...   the trained model
out/result.json          history and evaluation; written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seqmix.core.errors import CheckpointError, SeqmixError
from seqmix.core.files import OutputError, write_text
from seqmix.models.pretrained import written

RUN, RESULT, RECORD, UNFINISHED = "run.json", "result.json", "record.json", ".unfinished"


class RunFolder:
    """Opens `path` for a run with these arguments.

    Raises `OutputError` where the folder holds something else, `CheckpointError` where it holds a run with
    other arguments.
    """

    def __init__(self, path: str | Path, arguments: Mapping[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        arguments = json.loads(json.dumps(arguments))
        is_used = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if is_used:
            self._check(arguments, resume=resume)
        else:
            write_text(self.path / RUN, json.dumps(arguments, indent=2) + "\n")

    def _check(self, arguments: dict[str, Any], *, resume: bool) -> None:
        if not (self.path / RUN).is_file():
            raise OutputError(
                f"{self.path} exists and holds no run of seqmix. Choose another folder for `out`."
            )
        if not resume:
            raise OutputError(
                f"{self.path} holds an earlier run. Choose another folder for `out`, move it away, or "
                "let it be resumed."
            )
        earlier = read_json(self.path / RUN)
        for name in sorted({*earlier, *arguments}):
            if earlier.get(name) != arguments.get(name):
                raise CheckpointError(
                    f"{self.path} holds a run with {name}={_short(earlier.get(name))}, and this one has "
                    f"{name}={_short(arguments.get(name))}. Give the same arguments to resume it, or "
                    "another folder for `out`."
                )

    def result(self) -> dict[str, Any] | None:
        """What a finished run recorded; None while it is not finished."""
        path = self.path / RESULT
        return read_json(path) if path.is_file() else None

    def scratch(self) -> Path:
        """An empty folder, on the same disk, for a checkpoint that is being written."""
        folder = self.checkpoints / UNFINISHED
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Explains why something cannot be saved; what was saved before stays as it is."""
        try:
            with written():
                yield
        except SeqmixError:
            raise
        except OSError as error:
            shutil.rmtree(self.checkpoints / UNFINISHED, ignore_errors=True)
            raise OutputError(
                f"Cannot save in {self.path}: {error}. The checkpoint before this one is untouched. "
                "Free some space or make the folder writable, then run the same command again."
            ) from error

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return max(self.checkpoints.glob("step-*"), key=_step, default=None)

    def keep(self, written: Path, step: int) -> Path:
        """Moves a complete checkpoint into place, then removes older ones."""
        target = self.checkpoints / f"step-{step}"
        if target.exists():  # saved twice at the same step: the contents are the same
            shutil.rmtree(written)
        else:
            os.replace(written, target)
        for folder in self.checkpoints.glob("step-*"):
            if folder != target:
                shutil.rmtree(folder)
        return target

    def finish(self, model: Any, tokenizer: Any, result: Mapping[str, Any]) -> None:
        """Writes the model, the tokeniser and the result, then removes the checkpoints."""
        with self.saving():
            scratch = self.scratch()
            model.save_pretrained(scratch)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
            for file in scratch.iterdir():
                os.replace(file, self.path / file.name)
        write_text(self.path / RESULT, json.dumps(result) + "\n")
        shutil.rmtree(self.checkpoints)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises `CheckpointError` where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}). Give another folder for `out`."
        ) from error


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
