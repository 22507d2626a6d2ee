"""What a claim is: statements of a paper, each measured here and given a verdict.

A claim that does not hold here stays, with its evidence. Results are plain JSON; the documentation is
generated from them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seqmix.core.errors import ConfigError
from seqmix.core.files import write_text

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]
SIZES = ("quick", "full")


@dataclass(frozen=True)
class Finding:
    """One statement: what the paper leads one to expect, what was measured, and the verdict."""

    statement: str
    expected: str
    measured: Mapping[str, Any]
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A paper's claim.

    `measure(run)` measures it at `run.settings`, one of `quick` (seconds: shows that the measurement runs,
    its verdicts mean little) and `full` (at most ten minutes on two cores).
    """

    title: str
    paper: str  # arXiv number or another address
    claimed: str  # in our words
    where: str  # section, table or figure
    measure: Callable[[Run], list[Finding]]
    quick: Mapping[str, Any]
    full: Mapping[str, Any]


class Run:
    """One measurement of a claim: its settings, and a memory of what has been measured already.

    Every costly step goes through `remember`, which keeps its result in a file beside the output, so that a
    run that was stopped goes on where it was.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        memory: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.settings = dict(settings)
        self._memory = memory
        self._say = say
        self._known: dict[str, Any] = {"settings": _plain(self.settings), "results": {}}
        if memory is not None and memory.exists():
            known = _read_json(memory)
            if known.get("settings") == self._known["settings"]:
                self._known = known
        self.forms: set[tuple[str, str]] = set()

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    @property
    def seconds(self) -> float:
        """Time spent on the remembered steps, earlier starts included."""
        return sum(step["seconds"] for step in self._known["results"].values())

    def remember(self, name: str, measure: Callable[[], Any]) -> Any:
        """The JSON value of `measure()`, taken from the memory if an earlier start has measured it."""
        from seqmix.ops import record_forms

        results = self._known["results"]
        if name not in results:
            start = time.perf_counter()
            with record_forms() as forms:
                value = _plain(measure())
            results[name] = {
                "value": value,
                "seconds": round(time.perf_counter() - start, 2),
                "forms": sorted(map(list, forms)),
            }
            if self._memory is not None:
                write_text(self._memory, json.dumps(self._known))
            self._say(f"{name}: {_short(value)} ({results[name]['seconds']:.0f} s)")
        self.forms |= {(operator, form) for operator, form in results[name]["forms"]}
        return results[name]["value"]


def compare_groups(
    better: Sequence[float], worse: Sequence[float], *, margin: float = 0.0
) -> Verdict:
    """Whether `better` exceeds `worse` by more than `margin`, seeds considered.

    Reproduced if the means differ by more than the margin plus two standard errors; not reproduced if they
    fail the margin by two standard errors; inconclusive in between. One seed has no spread: then the margin
    alone decides, so give one that seeds do not bridge.
    """
    gap = statistics.fmean(better) - statistics.fmean(worse) - margin
    error = (
        2
        * sum(statistics.variance(g) / len(g) if len(g) > 1 else 0.0 for g in (better, worse))
        ** 0.5
    )
    if gap > error:
        return "reproduced"
    return "not reproduced" if gap <= -error else "inconclusive"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Reproduced if every one is; not reproduced if one is not; else inconclusive."""
    if set(verdicts) == {"reproduced"}:
        return "reproduced"
    return "not reproduced" if "not reproduced" in verdicts else "inconclusive"


def reproduce(
    claim: str,
    *,
    size: str = "full",
    out: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures a paper's claim here and returns the record: findings with verdicts, settings, machine.

    With `out`, the record is written to `out/ID.json`, and a run that was stopped goes on from
    `out/.ID.SIZE.partial.json`. Raises `UnknownName` for an id without a claim.
    """
    from seqmix.claims import CLAIMS
    from seqmix.measure.machine import describe

    if size not in SIZES:
        raise ConfigError(f"reproduce: size={size!r}, wanted one of {', '.join(SIZES)}.")
    description: Claim = CLAIMS.get(claim)
    name = claim.replace("_", "-")
    memory = None if out is None else Path(out) / f".{name}.{size}.partial.json"
    run = Run(getattr(description, size), memory, say)
    findings = description.measure(run)
    record = {
        "id": name,
        "title": description.title,
        "paper": description.paper,
        "claimed": description.claimed,
        "where": description.where,
        "size": size,
        "settings": _plain(run.settings),
        "verdict": overall([finding.verdict for finding in findings]),
        "findings": [_plain(dataclasses.asdict(finding)) for finding in findings],
        "seconds": round(run.seconds, 1),
        "forms": sorted(map(list, run.forms)),
        "machine": describe(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if out is not None:
        write_text(Path(out) / f"{name}.json", json.dumps(record, indent=2) + "\n")
        assert memory is not None
        memory.unlink(missing_ok=True)
    return record


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return {}  # not ours or damaged: measured again


def _plain(value: Any) -> Any:
    """JSON values only, floats rounded to six significant digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else text[:97] + "..."
