"""compare: train candidates at an equal budget, measure them here, and recommend one.

Everything is kept in one folder: `study.sqlite3` (unless another storage is named), a folder per trial with
its model, `comparison.json` and `report.html`. The same command goes on where it was interrupted, and
several processes with the same command share the trials.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from seqmix.core.errors import DataError, MissingExtra, RangeError
from seqmix.core.files import OutputError, write_text
from seqmix.data.language_modelling import language_modelling
from seqmix.data.text import read_text
from seqmix.measure import machine
from seqmix.measure.budget import contexts_of, parse_budget
from seqmix.measure.candidates import build_candidates, split_candidates
from seqmix.measure.progress import Progress
from seqmix.measure.recommend import QUALITY, recommend, summarise
from seqmix.measure.roofline import calibrate
from seqmix.measure.settings import check_effort, parse_equal, preset_with
from seqmix.measure.study import FORMAT, Claim, Key, Study, describe_storage
from seqmix.measure.table import comparison_table
from seqmix.measure.trial import TrialFailed, run_trial
from seqmix.models.backbone import ModelSpec, count_parameters
from seqmix.report.compare import render

STUDY = "study.sqlite3"
MARK = ".seqmix-compare"
POLL = 1.0  # seconds between looks at what another process does
ACTIVITY = {"train": "training", "serve": "measuring"}
# Errors that every trial would meet, so that they end the comparison.
NOT_THE_CANDIDATE = {kind.__name__: kind for kind in (DataError, MissingExtra, OutputError)}


@dataclass(frozen=True)
class Comparison:
    """What a comparison found, as plain values.

    `records` has one entry per candidate and seed: `candidate`, `seed`, `state`, and `result` or `failure`.
    `summaries` has one per candidate: quality over seeds, figures, whether it meets the budget.
    `recommendation` has `candidate` (None where none meets the budget, then `nearest`) and `reason`.
    """

    data: dict[str, Any]
    settings: dict[str, Any]
    budget: str | None
    terms: list[dict[str, Any]]
    machine: dict[str, Any]
    roofline: dict[str, Any]
    command: str
    records: list[dict[str, Any]]
    summaries: list[dict[str, Any]]
    recommendation: dict[str, Any]
    out: Path

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.out / "report.html"

    def to_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"out": str(self.out)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def table(self) -> Table:
        """One row per candidate, best quality first, for the terminal."""
        return comparison_table(self.summaries, self.settings, self.recommendation)


def compare(
    data: str | Path,
    candidates: str | Sequence[str],
    *,
    budget: str | None = None,
    equal: str = "parameters, tokens",
    preset: str = "quick",
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    length: int | None = None,
    batch: int | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    parameters: int | None = None,
    learning_rate: float | None = None,
    contexts: Sequence[int] | None = None,
    tokenizer: str = "bytes",
    seeds: int = 1,
    out: str | Path | None = None,
    storage: str | None = None,
    allow_other_machine: bool = False,
    retry_failed: bool = False,
    progress: bool = True,
) -> Comparison:
    """Trains each candidate on `data` at an equal budget, measures it, and recommends one for `budget`.

    `candidates` are layouts separated by ";". `equal` says what they share: `parameters` (widths and channel
    expansions are solved for about `parameters`, by default those of attention at the preset's width) or
    `width`, and `tokens` or `seconds` of training. `budget` reads like `decode_ms<2@8192, memory_mb<400`; it
    may change from call to call without training anything again. `out` defaults to `runs/compare-DATA`.

    A trial that fails (NaN, out of memory, a crash) is recorded with its reason and the study goes on.
    Raises `BudgetError`, `LayoutError`, `UnknownName`, `ConfigError` and `DataError` before anything trains,
    `StudyError` where `out` holds another comparison, and `OutputError` where it cannot be written.
    """
    for package in ("optuna", "plotly", "transformers"):
        if (
            importlib.util.find_spec(package) is None
        ):  # found, not imported: trials import what they need
            raise MissingExtra(
                f"compare needs {package}, which is not installed: pip install 'seqmix[compare]'"
            )
    terms = parse_budget(budget)
    layouts = split_candidates(candidates)
    size, effort = parse_equal(equal)
    check_effort(size, effort, tokens=tokens, seconds=seconds, parameters=parameters)
    chosen = preset_with(
        preset,
        {
            "width": width,
            "depth": depth,
            "heads": heads,
            "length": length,
            "batch": batch,
            "tokens": tokens,
            "seconds": seconds,
            "learning_rate": learning_rate,
            "contexts": contexts,
        },
    )
    if seeds < 1:
        raise RangeError(f"seeds={seeds}, wanted at least 1.")
    corpus = read_text(data)
    vocabulary = language_modelling(corpus, tokenizer=tokenizer, length=chosen.length).vocabulary
    sizes: dict[str, Any] = {"width": chosen.width, "depth": chosen.depth, "heads": chosen.heads}
    if size == "parameters" and parameters is None:
        parameters = count_parameters(ModelSpec(layout="attention", vocabulary=vocabulary, **sizes))
    built = build_candidates(layouts, **sizes, vocabulary=vocabulary, parameters=parameters)

    described = machine.describe()
    settings = {
        "candidates": layouts,
        "seeds": seeds,
        "equal": [size, effort],
        "parameters": parameters,
        "tokenizer": tokenizer,
        "preset": preset,
        **chosen.to_dict(),
        "contexts": sorted({*chosen.contexts, *contexts_of(terms)}),
    }
    del settings[{"tokens": "seconds", "seconds": "tokens"}[effort]]
    manifest = {
        "format": FORMAT,
        "versions": {name: described["versions"][name] for name in ("seqmix", "torch")},
        "machine": machine.identity(described),
        "data": {"name": corpus.name, "fingerprint": corpus.fingerprint},
        "settings": settings,
    }
    folder = _own_folder(Path(out or f"runs/compare-{_slug(corpus.name)}"))
    # A file of its own holds one study, whatever becomes of the folder's name; a shared database many.
    study = Study(
        storage or folder / STUDY,
        folder.resolve().name if storage else "comparison",
        manifest,
        allow_other_machine=allow_other_machine,
    )
    settings = study.settings
    roofline = study.attribute("roofline", lambda: calibrate().to_dict())
    study.enqueue_missing(retry_failed=retry_failed)
    work = _Work(
        study=study,
        folder=folder,
        specs={candidate.layout: candidate.spec.to_dict() for candidate in built},
        common={
            "data": str(data),
            "contexts": settings["contexts"],
            "seconds": settings["measure_seconds"],
            "roofline": roofline,
            "training": {
                "length": settings["length"],
                "batch": settings["batch"],
                effort: settings[effort],
                "learning_rate": settings["learning_rate"],
                "tokenizer": tokenizer,
                "progress": True,  # into the log of the trial
            },
        },
    )
    work.run(progress=progress)

    records = [
        {"candidate": key.candidate, "seed": key.seed, **outcome}
        for key, outcome in study.outcomes().items()
    ]
    summaries = [
        summarise(layout, [r for r in records if r["candidate"] == layout], terms)
        for layout in layouts
    ]
    found = Comparison(
        data={
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            "bytes": corpus.bytes,
            "documents": len(corpus.documents),
        },
        settings=settings,
        budget=budget or None,
        terms=[asdict(term) | {"text": str(term)} for term in terms],
        machine=described,
        roofline=roofline,
        command=reproduce_command(data, settings, budget=budget, out=folder, storage=storage),
        records=records,
        summaries=summaries,
        recommendation=recommend(summaries, terms),
        out=folder,
    )
    write_text(folder / "comparison.json", found.to_json())
    write_text(found.report, render(found.to_dict()))
    return found


@dataclass(frozen=True)
class _Work:
    """The trials of a study, as this process runs them."""

    study: Study
    folder: Path
    specs: dict[str, dict[str, Any]]
    common: dict[str, Any]

    def run(self, *, progress: bool) -> None:
        """Runs trials until every one is finished, here or in another process."""
        with Progress(len(self.study.keys), shown=progress) as bar:
            while True:
                claim = self.study.claim()
                states = [outcome["state"] for outcome in self.study.outcomes().values()]
                bar.finished(states.count("complete") + states.count("failed"))
                if claim is not None:
                    self._run(claim, bar)
                elif "running" in states:
                    bar.show("waiting for another process")
                    time.sleep(POLL)
                    self.study.enqueue_missing()
                elif "waiting" not in states:
                    return

    def _run(self, claim: Claim, bar: Progress) -> None:
        spec = self.specs[claim.key.candidate]
        job = self.common | {"spec": spec}
        job["training"] = job["training"] | {"seed": claim.key.seed}
        folder = self.folder / "trials" / _trial_name(claim.key, job)
        neighbours = 0

        def watch(stage: str) -> None:
            nonlocal neighbours
            claim.beat()
            bar.show(f"{claim.key.candidate}, seed {claim.key.seed}: {ACTIVITY[stage]}")
            if stage == "serve" and not neighbours:
                neighbours = self.study.neighbours(claim.key)

        try:
            found = run_trial(job, folder, watch=watch)
        except TrialFailed as failure:
            if failure.kind in NOT_THE_CANDIDATE:
                claim.release()
                raise NOT_THE_CANDIDATE[failure.kind](failure.reason) from failure
            claim.fail(failure.to_dict())
        except BaseException:  # Ctrl-C, a full disk: the trial is left for the next command
            claim.release()
            raise
        else:
            train, serve = found["train"], found["serve"]
            result = {
                "spec": spec,
                "quality": train["quality"],
                "training": train["training"],
                "train_memory": train["memory"],
                "forms": {"train": train["forms"], **serve["forms"]},
                "serve": serve,
                "machine": machine.describe(),
                "neighbours": neighbours,
            }
            longest = str(max(self.common["contexts"]))
            claim.complete(
                result,
                [
                    train["quality"][QUALITY],
                    serve["decode_ms"][longest]["median"],
                    serve["memory"]["memory_mb"],
                ],
            )


def reproduce_command(
    data: str | Path,
    settings: dict[str, Any],
    *,
    budget: str | None,
    out: Path,
    storage: str | None,
) -> str:
    """The command line that makes the same comparison."""
    effort = settings["equal"][1]
    options: dict[str, Any] = {
        "data": data,
        "candidates": "; ".join(settings["candidates"]),
        "budget": budget,
        "equal": ", ".join(settings["equal"]),
        "preset": settings["preset"],
        "seeds": settings["seeds"],
        "out": out,
        "storage": storage and describe_storage(storage),
    }
    names = ["width", "depth", "heads", "length", "batch", effort, "parameters", "learning_rate"]
    options |= {name: settings[name] for name in names}
    options |= {
        "contexts": ",".join(map(str, settings["contexts"])),
        "tokenizer": settings["tokenizer"],
    }
    words = ["seqmix", "compare"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", shlex.quote(str(value))]
    return " ".join(words)


def _own_folder(folder: Path) -> Path:
    """`folder`, new, empty or from an earlier comparison; raises `OutputError` where it is anything else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        has_others = any(folder.iterdir()) and not (folder / MARK).exists()
    except OSError as error:
        raise OutputError(
            f"out={folder} cannot be used: {error.strerror}. Choose another --out."
        ) from error
    if has_others:
        raise OutputError(
            f"out={folder} holds files that are not a comparison's. Choose another --out."
        )
    write_text(folder / MARK, "A comparison of seqmix; the same command goes on with it.\n")
    return folder


def _trial_name(key: Key, job: dict[str, Any]) -> str:
    """A folder that no other job shares: what lies in it is the beginning of this very trial."""
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:8]
    return f"{_slug(key.candidate)[:40]}-{digest}-seed{key.seed}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "data"
