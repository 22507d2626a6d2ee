"""What `seqmix bench` measures, part by part, each kept until the whole record is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seqmix.core.errors import ConfigError, UnknownName
from seqmix.core.files import write_text
from seqmix.measure import curves
from seqmix.measure.bench import MATMUL_SIZE, time_case
from seqmix.measure.calls import DTYPES, PASSES
from seqmix.measure.floors import FLOORS, measure_floor, summarise
from seqmix.measure.kept import Kept
from seqmix.measure.machine import describe
from seqmix.measure.roofs import Settings, measure_roofs
from seqmix.ops import OPERATORS
from seqmix.ops._operator import Operator

Record = dict[str, Any]
Say = Callable[[str], None]
Wrong = Callable[[Operator, str], str | None]


@dataclass(frozen=True)
class Choice:
    """What of all there is to measure; None for everything."""

    operators: Sequence[str] | None = None
    forms: Sequence[str] | None = None
    cases: Sequence[str] | None = None
    dtypes: Sequence[str] = tuple(DTYPES)
    lengths: Sequence[int] = curves.LENGTHS  # of the curves; none for no curves
    seconds: float = 0.5
    matmul_size: int = MATMUL_SIZE
    shrink: int = (
        1  # divides the lengths of timing cases and floors: a quick look that means little
    )

    def __post_init__(self) -> None:
        for name in self.operators or ():
            OPERATORS.get(name)
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise UnknownName("dtype", dtype, list(DTYPES))
        if any(length < 1 for length in self.lengths):
            raise ConfigError(f"lengths={list(self.lengths)}, wanted numbers of at least 1.")
        for given, kind in ((self.forms, "form"), (self.cases, "timing case")):
            operators = map(OPERATORS.get, self.operators or OPERATORS.names())
            known = {name for operator in operators for name in _names(operator, kind)}
            for name in given or ():
                if name not in known:
                    raise UnknownName(kind, name, sorted(known))

    def chosen(self) -> list[Operator]:
        """The operators, shortened if so wanted, with the forms and cases that are measured."""
        return [self._cut(OPERATORS.get(n)) for n in self.operators or OPERATORS.names()]

    def _cut(self, operator: Operator) -> Operator:
        timing = [
            curves.at_length(case, max(1, case["T"] // self.shrink)) if self.shrink > 1 else case
            for case in operator.timing
            if self.cases is None or case.name in self.cases
        ]
        forms = {n: f for n, f in operator.forms.items() if self.forms is None or n in self.forms}
        return replace(operator, timing=timing, forms=forms)

    def settings(self) -> Settings:
        return Settings(seconds=self.seconds, shrink=self.shrink, matmul_size=self.matmul_size)


def _names(operator: Operator, kind: str) -> list[str]:
    return list(operator.forms) if kind == "form" else [case.name for case in operator.timing]


def measure_table(
    choice: Choice, *, out: Path, wrong: Wrong, say: Say = lambda line: None
) -> Record:
    """Every form on every timing case, and the curves against length; the record goes to `out/bench.json`.

    `wrong(operator, form)` says what is wrong with a form on the operator's small cases; such a form gets no
    time.
    """
    kept = _open(out / ".bench.partial.json", choice)
    record = _start(choice, kept)
    jobs = [(o, c, d) for o in choice.chosen() for c in o.timing for d in choice.dtypes]
    verdicts: dict[tuple[str, str], str | None] = {}

    def check(operator: Operator) -> Callable[[str], str | None]:
        def verdict(form: str) -> str | None:
            key = (operator.name, form)
            if key not in verdicts:
                verdicts[key] = wrong(OPERATORS.get(operator.name), form)
            return verdicts[key]

        return verdict

    for number, (operator, case, dtype) in enumerate(jobs):
        name = f"{operator.name} {case.name} {dtype}"
        say(f"[{number + 1}/{len(jobs)}] {name}")
        measure = partial(
            time_case,
            operator,
            case,
            dtype,
            wrong=check(operator),
            seconds=choice.seconds,
            matmul_size=choice.matmul_size,
        )
        record["rows"] += kept(name, measure)
    record["curves"] = _measure_curves(choice, kept, check, say)
    return _finish(kept, out / "bench.json", record)


def _measure_curves(choice: Choice, kept: Kept, check: Any, say: Say) -> list[Record]:
    if not choice.lengths:
        return []
    jobs = [
        (operator, case, dtype, passes)
        for operator in choice.chosen()
        for case in curves.cases(operator)
        for dtype in choice.dtypes
        for passes in PASSES
    ]
    found: list[Record] = []
    for number, (operator, case, dtype, passes) in enumerate(jobs):
        name = f"{operator.name} {case.name} {dtype} {passes} against length"
        say(f"[{number + 1}/{len(jobs)}] {name}")
        measure = partial(
            curves.measure_case,
            operator,
            case,
            dtype,
            passes,
            choice.lengths,
            seconds=choice.seconds / 2,
            wrong=check(operator),
            threads=torch.get_num_threads(),
        )
        found += kept(name, measure)
    return found


def measure_floors(choice: Choice, *, out: Path, say: Say = lambda line: None) -> Record:
    """Every speed to reach, measured; the record goes to `out/speed.json`."""
    kept = _open(out / ".speed.partial.json", choice)
    record = _start(choice, kept)
    for number, floor in enumerate(FLOORS):
        say(f"[{number + 1}/{len(FLOORS)}] {floor.what} against {floor.against}")
        name = f"{floor.what} against {floor.against}"
        record["rows"] += kept(name, partial(measure_floor, floor, choice.settings()))
    record["floors"] = summarise(record["rows"], record["roofs"])
    return _finish(kept, out / "speed.json", record)


def _open(path: Path, choice: Choice) -> Kept:
    machine = describe()
    return Kept(path, {"choice": asdict(choice), "machine": machine})


def _finish(kept: Kept, path: Path, record: Record) -> Record:
    record = _rounded(record)
    write_text(path, json.dumps(record, indent=1) + "\n")
    kept.finish()
    return record


def _rounded(value: Any) -> Any:
    """Floats with four significant digits: more are noise."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _start(choice: Choice, kept: Kept) -> Record:
    return {
        "machine": describe(),
        "date": time.strftime("%Y-%m-%d"),
        "settings": {
            "seconds": choice.seconds,
            "dtypes": list(choice.dtypes),
            "shrink": choice.shrink,
            "matmul_size": choice.matmul_size,
        },
        "roofs": kept("roofs", lambda: asdict(measure_roofs(choice.settings()))),
        "rows": [],
    }
