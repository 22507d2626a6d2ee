"""The study of a comparison: an Optuna study whose trials are candidates and seeds, shared by any number
of processes.

A running trial carries the process that runs it and a heartbeat. When that process is gone, the trial is
closed and enqueued again, so whatever is killed, the same command goes on: a trial in state FAIL without a
`failure` was interrupted and does not count. Optuna hands out each waiting trial once on a server; on an SQLite
file, which cannot lock a row, processes take turns through a lock file. Where two processes enqueued the same
work, the later trial is dropped.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from seqmix.core.errors import StudyError
from seqmix.core.extras import require
from seqmix.core.files import OutputError

FORMAT = 1  # of the manifest and the results; a study of another format is refused
HEARTBEAT = 20.0  # seconds between signs of life
SILENCE = 120.0  # seconds without one after which a process on another machine counts as dead
METRICS = ("bits_per_byte", "decode_ms", "memory_mb")
CREATING = ("already exists", "locked", "unique constraint", "no such table", "does not exist")
FULL = ("readonly", "read-only", "unable to open", "full", "disk i/o")


@dataclass(frozen=True)
class Key:
    """What a trial is about."""

    candidate: str
    seed: int


class Study:
    """A study on `storage`, an SQLite file or a database URL, that belongs to one `manifest`.

    Raises `StudyError` where the study of that name has another manifest, saying what differs, and
    `OutputError` where the file cannot be written.
    """

    def __init__(
        self,
        storage: str | Path,
        name: str,
        manifest: dict[str, Any],
        *,
        allow_other_machine: bool = False,
    ) -> None:
        optuna = require("optuna", extra="compare")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._states = optuna.trial.TrialState
        self.where = describe_storage(storage)
        self.keys = [
            Key(candidate, seed)
            for seed in range(manifest["settings"]["seeds"])
            for candidate in manifest["settings"]["candidates"]
        ]
        manifest = json.loads(json.dumps(manifest))  # as it comes back from the database
        with self._errors():
            url = storage if "://" in str(storage) else f"sqlite:///{storage}"
            self._turn = _lock(str(url))
            self._study = self._connect(optuna, str(url), name)
            stored = self._study.user_attrs.get("manifest")
            if stored is None:
                if self._study.trials:
                    raise StudyError(
                        f"{self.where} holds a study {name!r} that compare did not make. "
                        "Choose another --out or --storage."
                    )
                self._study.set_user_attr("manifest", manifest)
        if stored is not None:
            check_manifest(
                stored, manifest, where=self.where, allow_other_machine=allow_other_machine
            )
        self.settings: dict[str, Any] = (stored or manifest)["settings"]

    def _connect(self, optuna: Any, url: str, name: str) -> Any:
        from sqlalchemy.exc import DatabaseError

        for left in range(10, -1, -1):
            try:
                storage = optuna.storages.RDBStorage(url, engine_kwargs=_engine(url))
                return optuna.create_study(
                    storage=storage,
                    study_name=name,
                    directions=["minimize"] * len(METRICS),
                    load_if_exists=True,
                    sampler=optuna.samplers.RandomSampler(seed=0),
                )
            except (DatabaseError, optuna.exceptions.StorageInternalError) as error:
                # Two processes that start at once both create the tables; the second finds them later.
                cause = str(error.__cause__ or error).lower()
                if not left or not any(word in cause for word in CREATING):
                    raise
                time.sleep(0.2)
        raise AssertionError("unreachable")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of the database as ours."""
        from sqlalchemy.exc import SQLAlchemyError

        optuna = require("optuna", extra="compare")
        try:
            yield
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            cause = str(getattr(error, "orig", None) or error.__cause__ or error).splitlines()[0]
            if any(word in cause.lower() for word in FULL):
                raise OutputError(
                    f"Cannot write the study at {self.where}: {cause}. Finished trials are kept. Free some "
                    "space or choose another --out, then run the same command again."
                ) from error
            raise StudyError(
                f"The study at {self.where} cannot be used: {cause}. Check the file or the server; "
                "or choose another --out."
            ) from error
        except ImportError as error:
            raise StudyError(
                f"The database at {self.where} needs a driver that is not installed ({error}). "
                "For PostgreSQL: pip install 'seqmix[postgresql]'"
            ) from error

    def attribute(self, name: str, default: Callable[[], Any]) -> Any:
        """A value that the first process makes and stores, and every other reads."""
        with self._errors():
            if name not in self._study.user_attrs:
                self._study.set_user_attr(name, default())
            return self._study.user_attrs[name]

    def enqueue_missing(self, *, retry_failed: bool = False) -> None:
        """Closes the trials of processes that are gone, and enqueues every key that has no trial."""
        with self._errors(), self._turn:
            for trial in self._study.get_trials(deepcopy=False):
                if trial.state == self._states.RUNNING and not is_alive(trial):
                    self._close(trial.number)
            taken = {
                key
                for key, trial in self._counted()
                if not (retry_failed and trial.state == self._states.FAIL)
            }
            for key in self.keys:
                if key not in taken:
                    self._study.enqueue_trial(asdict(key), user_attrs=asdict(key))

    def claim(self) -> Claim | None:
        """A trial that is now this process's own, or None where none is waiting."""
        with self._errors(), self._turn:
            while self._study.get_trials(deepcopy=False, states=(self._states.WAITING,)):
                trial = self._study.ask()
                if "candidate" not in trial.user_attrs:
                    self._close(
                        trial.number
                    )  # another process took the last one, so this is a new trial
                    continue
                key = Key(trial.user_attrs["candidate"], trial.user_attrs["seed"])
                trial.set_user_attr("worker", this_process())
                # The parameters show in Optuna's own tools.
                trial.suggest_categorical(
                    "candidate", [k.candidate for k in self.keys if k.seed == 0]
                )
                trial.suggest_int("seed", 0, max(k.seed for k in self.keys))
                if any(
                    other == key and t.number < trial.number and t.state != self._states.FAIL
                    for other, t in self._counted()
                ):
                    self._close(trial.number)
                    continue
                return Claim(self, trial, key)
        return None

    def outcomes(self) -> dict[Key, dict[str, Any]]:
        """For each key its newest trial: `state` waiting, running, complete or failed, with the `result`
        or the `failure`.
        """
        found: dict[Key, dict[str, Any]] = {key: {"state": "waiting"} for key in self.keys}
        names = {
            self._states.RUNNING: "running",
            self._states.COMPLETE: "complete",
            self._states.FAIL: "failed",
        }
        with self._errors():
            for key, trial in self._counted():
                if key in found and found[key]["state"] != "complete":
                    found[key] = {
                        "state": names.get(trial.state, "waiting"),
                        "result": trial.user_attrs.get("result"),
                        "failure": trial.user_attrs.get("failure"),
                    }
        return found

    def neighbours(self, key: Key) -> int:
        """How many other trials of this study run on this machine now: they slow down what is measured."""
        with self._errors():
            return sum(
                other != key
                and trial.state == self._states.RUNNING
                and trial.user_attrs.get("worker", {}).get("host") == _host()
                and is_alive(trial)
                for other, trial in self._counted()
            )

    def _counted(self) -> Iterator[tuple[Key, Any]]:
        """Every trial of this comparison that was not interrupted, by number."""
        for trial in self._study.get_trials(deepcopy=False):
            interrupted = trial.state == self._states.FAIL and "failure" not in trial.user_attrs
            if "candidate" in trial.user_attrs and not interrupted:
                yield Key(trial.user_attrs["candidate"], trial.user_attrs["seed"]), trial

    def _close(self, number: int) -> None:
        self._study.tell(number, state=self._states.FAIL, skip_if_finished=True)


class Claim:
    """A trial that this process runs."""

    def __init__(self, study: Study, trial: Any, key: Key) -> None:
        self.key = key
        self._study = study
        self._trial = trial
        self._last = 0.0

    def beat(self) -> None:
        """Says that this process is alive, at most once per `HEARTBEAT`."""
        if time.monotonic() - self._last > HEARTBEAT:
            with self._study._errors():
                self._trial.set_user_attr("heartbeat", time.time())
            self._last = time.monotonic()

    def complete(self, result: dict[str, Any], values: Sequence[float]) -> None:
        """Stores the result; `values` are those of `METRICS`."""
        self._finish("result", result, values=list(values))

    def fail(self, failure: dict[str, Any]) -> None:
        """Stores why there is no result."""
        self._finish("failure", failure, state=self._study._states.FAIL)

    def release(self) -> None:
        """Gives the trial back: another process, or the next command, runs it."""
        with self._study._errors():
            self._study._close(self._trial.number)

    def _finish(self, name: str, value: dict[str, Any], **outcome: Any) -> None:
        with self._study._errors():
            self._trial.set_user_attr(name, value)
            self._study._study.tell(self._trial, **outcome)


def this_process() -> dict[str, Any]:
    """What tells this process from every other that may share the study."""
    return {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_alive(trial: Any) -> bool:
    """Whether the process that runs the trial is still there: asked on this machine, else by heartbeat."""
    worker = trial.user_attrs.get("worker")
    if worker is not None and worker["host"] == _host():
        return _started(worker["pid"]) == worker["started"] is not None
    last = trial.user_attrs.get("heartbeat") or (
        trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    )
    return time.time() - last < SILENCE


def _host() -> str:
    """This boot of this machine, as seen from this container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [platform.node(), boot.read_text().strip() if boot.exists() else ""]
    parts += [os.readlink("/proc/self/ns/pid")] if Path("/proc/self/ns/pid").is_symlink() else []
    return "/".join(parts)


def _started(pid: int) -> str | None:
    """When the process began, so that a reused number is not mistaken for it; None where it is gone."""
    try:
        os.kill(pid, 0)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except ProcessLookupError:
        return None
    except (FileNotFoundError, PermissionError):
        return "unknown"  # no /proc, or a process of somebody else
    return None if fields[0] == "Z" else fields[19]


def describe_storage(storage: str | Path) -> str:
    """The storage without its password."""
    parts = urlsplit(str(storage))
    if not parts.scheme or not parts.password:
        return str(storage)
    return str(storage).replace(f":{parts.password}@", ":***@")


def _lock(url: str) -> AbstractContextManager[Any]:
    """What lets one process at a time take work from an SQLite file; a server sees to that itself."""
    path = url.partition("?")[0].removeprefix("sqlite:///")
    if path == url.partition("?")[0] or not path:
        return nullcontext()
    from filelock import FileLock

    return FileLock(f"{path}.lock")


def _engine(url: str) -> dict[str, Any]:
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}


def check_manifest(
    stored: dict[str, Any], manifest: dict[str, Any], *, where: str, allow_other_machine: bool
) -> None:
    """Raises `StudyError` with every difference between the study on disk and this command.

    More contexts may have been measured than this command asks for.
    """
    there, here = _flat(stored), _flat(manifest)
    if set(there.get("settings.contexts", ())) >= set(here.get("settings.contexts", ())):
        here["settings.contexts"] = there.get("settings.contexts")
    differing = [
        name
        for name in sorted(there | here)
        if there.get(name) != here.get(name)
        and not (allow_other_machine and name.startswith("machine."))
    ]
    if not differing:
        return
    lines = [
        f"  {name}: {_shown(there.get(name))} in the study, {_shown(here.get(name))} in this command"
        for name in differing
    ]
    kinds = {name.partition(".")[0] for name in differing}
    advice = ["Choose another --out for a new study; this one stays as it is."]
    if kinds <= {"machine"}:
        advice.append(
            "Speeds of two machines do not compare; --allow-other-machine goes on all the same, and the "
            "report names both."
        )
    elif kinds <= {"settings", "data"}:
        advice.append("Or give the settings of the study, and it goes on where it was.")
    elif kinds <= {"versions", "format"}:
        advice.append("Or install the versions of the study, and it goes on where it was.")
    raise StudyError(
        f"The study at {where} belongs to another comparison:\n" + "\n".join([*lines, *advice])
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)
