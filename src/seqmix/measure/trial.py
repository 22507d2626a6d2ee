"""One trial: a candidate trained in one process and measured in another, each with its own memory.

`python -m seqmix.measure.trial STAGE FOLDER` reads FOLDER/trial.json and writes FOLDER/STAGE.json. Stage
`train` trains and evaluates; stage `serve` loads the weights without the training libraries and measures
memory and speed. A process that ends without a result ends only its own trial.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqmix.core.errors import NumericalError, SeqmixError
from seqmix.core.files import write_text
from seqmix.measure.memory import PeakMemory

STAGES = ("train", "serve")
WEIGHTS = "weights.safetensors"
JOB = "trial.json"
PATIENCE = 15.0  # seconds that an interrupted stage has to save what it did
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass
class TrialFailed(Exception):
    """Why a trial has no result: `kind` is the class of error, `step` the training step if it is known."""

    stage: str
    kind: str
    reason: str
    step: int | None = None

    def __str__(self) -> str:
        return self.reason

    def to_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "kind": self.kind, "reason": self.reason, "step": self.step}


def stage_command(stage: str, folder: Path) -> list[str]:
    """The process that runs one stage."""
    return [sys.executable, "-m", "seqmix.measure.trial", stage, str(folder)]


def run_trial(
    job: dict[str, Any], folder: Path, *, watch: Callable[[str], None], poll: float = 0.2
) -> dict[str, Any]:
    """Runs the stages of `job` and returns the result of each, under its name.

    `watch(stage)` is called every `poll` seconds. A stage that has its result from before is not repeated.
    Raises `TrialFailed`; the output of the processes stays in FOLDER/STAGE.log.
    """
    write_text(folder / JOB, json.dumps(job, indent=1))
    return {stage: _run_stage(stage, folder, watch, poll) for stage in STAGES}


def _run_stage(
    stage: str, folder: Path, watch: Callable[[str], None], poll: float
) -> dict[str, Any]:
    result = folder / f"{stage}.json"
    if not result.exists():
        code = _run_process(stage, folder, watch, poll)
        if not result.exists():
            raise _death(stage, code, folder / f"{stage}.log")
    found = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        result.unlink()  # a failed stage is tried again when its trial is
        raise TrialFailed(stage, **found["error"])
    return found


def _run_process(stage: str, folder: Path, watch: Callable[[str], None], poll: float) -> int:
    with (folder / f"{stage}.log").open("ab") as log:
        # Its own session: Ctrl-C reaches only this process, which then ends the child in good order.
        # The pipe to its standard input breaks when this process dies, even by kill -9.
        child = subprocess.Popen(
            stage_command(stage, folder),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while True:
                watch(stage)
                try:
                    return child.wait(poll)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if child.poll() is None:
                _stop(child)
            if child.stdin is not None:
                child.stdin.close()


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ctrl-C first, so that training saves a checkpoint; then the hard way."""
    child.send_signal(signal.SIGINT)
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _death(stage: str, code: int, log: Path) -> TrialFailed:
    """What a process without a result died of."""
    if code == -signal.SIGKILL:
        return TrialFailed(
            stage,
            "MemoryError",
            "killed by signal 9: most likely out of memory. Use a smaller width, batch or context.",
        )
    if code < 0:
        return TrialFailed(
            stage, "Crash", f"died of signal {-code} ({signal.Signals(-code).name}); see {log}."
        )
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no output"
    return TrialFailed(stage, "Crash", f"ended with code {code}: {last} (see {log}).")


def _train(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    from safetensors.torch import save_model

    from seqmix.models.backbone import LanguageModel, ModelSpec
    from seqmix.train import train

    with PeakMemory() as memory:
        trained = train(
            ModelSpec.from_dict(job["spec"]), job["data"], out=folder / "model", **job["training"]
        )
    model = next(m for m in trained.model.modules() if isinstance(m, LanguageModel))
    save_model(model, str(folder / WEIGHTS))
    return {
        "quality": trained.evaluation,
        "training": {
            "steps": trained.steps,
            "tokens": trained.tokens,
            "seconds": trained.seconds,
            "tokens_per_second": trained.tokens_per_second,
            "history": trained.history,
        },
        "forms": sorted(list(pair) for pair in trained.forms),
        "memory": memory.to_dict(),
    }


def _serve(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_model

    from seqmix.measure import speed
    from seqmix.measure.roofline import Roofline
    from seqmix.models.backbone import LanguageModel, ModelSpec

    torch.manual_seed(0)
    roofline = Roofline(**job["roofline"])
    with PeakMemory() as memory:
        model = LanguageModel(ModelSpec.from_dict(job["spec"]))
        load_model(model, str(folder / WEIGHTS))
        found = speed.inference_speed(
            model, job["contexts"], roofline=roofline, seconds=job["seconds"]
        )
    sizes = {name: job["training"][name] for name in ("length", "batch")}
    training = speed.training_speed(model, **sizes, seconds=job["seconds"])
    predicted = speed.predicted_training_speed(model, **sizes, roofline=roofline)
    return found | {
        "memory": memory.to_dict(),
        "train_tokens_s": training.to_dict() | {"predicted": predicted},
        "parameters": model.num_parameters(),
    }


def _explain(error: BaseException) -> dict[str, Any]:
    """The error as plain values, out of memory told apart."""
    text, kind = str(error) or type(error).__name__, type(error).__name__
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        first = text.splitlines()[0]
        return {
            "kind": "MemoryError",
            "reason": f"out of memory ({first}). Use a smaller width, batch or context.",
        }
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        kind = "OutputError"
    step = getattr(error, "step", None) if isinstance(error, NumericalError) else None
    reason = text if isinstance(error, SeqmixError) else f"{kind}: {text}"
    return {"kind": kind, "reason": reason, "step": step}


def _end_with_parent() -> None:
    """Ends this process when its standard input closes, which happens when the parent is gone."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock the interpreter wants when it ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(stage: str, folder: Path) -> int:
    """Runs one stage and writes its result, or why there is none."""
    import traceback

    _end_with_parent()
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    start = time.perf_counter()
    try:
        result = {"train": _train, "serve": _serve}[stage](job, folder)
        result["process_seconds"] = time.perf_counter() - start
    except Exception as error:  # the parent hears of every failure, and the log keeps the traceback
        traceback.print_exc()
        result = {"error": _explain(error)}
    write_text(folder / f"{stage}.json", json.dumps(result))
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
