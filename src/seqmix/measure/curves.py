"""Time and memory against length, for every form of an operator and every peer that is installed.

Memory is the most that one call needs beyond what was there before it. It is measured in a process of its
own (`python -m seqmix.measure.curves`), in which freed memory goes back to the system at once; times are
measured in the process of the run. A curve ends where the next length would take too long or too much memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from seqmix.core.errors import NoUsableForm
from seqmix.measure.bench import milliseconds
from seqmix.measure.calls import (
    DTYPES,
    Call,
    Inputs,
    call,
    disagreement,
    draw,
    exactly,
)
from seqmix.measure.machine import memory_gb
from seqmix.measure.memory import PeakMemory
from seqmix.measure.peers import Peer, peers_of
from seqmix.measure.timing import time_in_turn
from seqmix.ops import OPERATORS, Case
from seqmix.ops._operator import Operator

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LONGEST_CALL = 8.0  # seconds: the curve ends before a call that would be slower
SHARE = 0.2  # of the machine's memory that one call may take
OURS = "seqmix"
# Every allocation above 64 KiB comes from the system and goes back to it, so that peaks are the call's own.
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def cases(operator: Operator) -> list[Case]:
    """The timing cases that are drawn: the first, and every one that a peer does too."""
    timing = list(operator.timing)
    return [c for i, c in enumerate(timing) if i == 0 or peers_of(operator.name, c.name)]


def at_length(case: Case, length: int) -> Case:
    """The case at another T; keys of the same texts, and filters as long as they, move along."""
    sizes = {"T": length}
    if "S" in case.sizes:
        sizes["S"] = max(length, case["S"] - case["T"] + length)
    if case.get("L") == case["T"]:
        sizes["L"] = length
    return case.at(None, **sizes)


def names(operator: Operator, case: Case) -> list[str]:
    """Every curve of the case: forms as `seqmix FORM`, and peers that are installed."""
    forms = [f"{OURS} {form}" for form in operator.forms]
    return forms + [p.name for p in peers_of(operator.name, case.name) if p.missing() is None]


def prepare(operator: Operator, case: Case, dtype: str, name: str) -> tuple[Call, Inputs, bool]:
    """The call of one curve on texts without an initial state, its inputs, and whether its output is ours."""
    inputs = draw(operator, case, DTYPES[dtype])
    inputs.pop("initial_state", None)
    peer = _peer(operator, case, name)
    if peer is None:
        return call(operator, inputs, name.removeprefix(f"{OURS} ")), inputs, True
    return peer.call(inputs), inputs, peer.same


def _peer(operator: Operator, case: Case, name: str) -> Peer | None:
    return next((p for p in peers_of(operator.name, case.name) if p.name == name), None)


def measure_case(
    operator: Operator,
    case: Case,
    dtype: str,
    passes: str,
    lengths: Sequence[int],
    *,
    seconds: float,
    wrong: Callable[[str], str | None],
    threads: int,
    longest: float = LONGEST_CALL,
) -> list[dict[str, Any]]:
    """One record per curve: its points (length, ms with quartiles, bytes), or why there are none.

    A curve ends before a call that could take more than `longest` seconds.
    """
    found = []
    usable: dict[str, dict[int, int]] = {}
    for name in names(operator, case):
        curve: dict[str, Any] = {
            "operator": operator.name,
            "case": case.name,
            "dtype": dtype,
            "pass": passes,
            "name": name,
            "points": [],
        }
        found.append(curve)
        if reason := _refused(operator, case, dtype, passes, min(lengths), name, wrong):
            curve["skipped"] = reason
            continue
        usable[name] = {}
    job: dict[str, Any] = {"operator": operator.name, "case": case.name, "dtype": dtype}
    job |= {"pass": passes}
    job |= {"names": list(usable), "lengths": sorted(lengths), "threads": threads}
    job["longest"] = longest
    memory = peak_bytes(job) if usable else {}
    for curve in found:
        if (name := curve["name"]) in usable:
            usable[name] = {int(n): taken for n, taken in memory[name]["bytes"].items()}
            if memory[name]["ended"]:
                curve["ended"] = memory[name]["ended"]
    for length in sorted(lengths):
        here = [name for name, points in usable.items() if length in points]
        calls = {
            name: prepare(operator, at_length(case, length), dtype, name)[0].timed(passes)
            for name in here
        }
        timings = time_in_turn(calls, seconds=seconds, warmup=1, minimum=2) if calls else {}
        for curve in found:
            if (name := curve["name"]) in timings:
                point = {"length": length, "bytes": usable[name][length]}
                curve["points"].append(point | milliseconds(timings[name]))
    return found


def _refused(
    operator: Operator,
    case: Case,
    dtype: str,
    passes: str,
    shortest: int,
    name: str,
    wrong: Callable[[str], str | None],
) -> str | None:
    """Why a curve gets no times: it is wrong, cannot run here or has no backward."""
    form = name.removeprefix(f"{OURS} ") if name.startswith(f"{OURS} ") else None
    if form and (reason := wrong(form)):
        return f"disagrees with the definition: {reason}"
    if form and passes != "forward" and not operator.forms[form].trains:
        return "has no backward"
    made, inputs, same = prepare(operator, at_length(case, shortest), dtype, name)
    try:
        if same:
            exact = exactly(operator, inputs)
            if reason := disagreement(made, exact, DTYPES[dtype], gradients=False):
                return f"wrong at length {shortest}: {reason}"
    except NoUsableForm as error:
        return error.rejected[form] if form else str(error)
    return None


def peak_bytes(job: dict[str, Any]) -> dict[str, Any]:
    """For every name: `bytes` by length that one call takes at its peak, and `ended`, why longer ones lack."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **ALLOCATION},
        check=False,
    )
    lines = done.stderr.strip().splitlines()
    death = {
        "bytes": {},
        "ended": f"died with code {done.returncode}: {lines[-1] if lines else ''}",
    }
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict.fromkeys(job["names"], death) | {record["name"]: record for record in found}


def _measure_memory(job: dict[str, Any], name: str) -> dict[str, Any]:
    operator = OPERATORS.get(job["operator"])
    case = next(c for c in operator.timing if c.name == job["case"])
    most = SHARE * memory_gb() * 2**30
    taken: dict[int, int] = {}
    ended = None
    before, slowest = 0, 0.0
    for length in (min(job["lengths"]), *job["lengths"]):  # the first warms up
        growth = (length / before) ** 2 if before else 1.0
        if slowest * growth > job["longest"] or max(taken.values(), default=0) * growth > most:
            ended = f"length {length} could take more than {job['longest']:.0f} s or {most / 2**30:.0f} GiB"
            break
        made, _, _ = prepare(operator, at_length(case, length), job["dtype"], name)
        timed = made.timed(job["pass"])
        start = time.perf_counter()
        try:
            with PeakMemory() as memory:
                timed()
        except NoUsableForm as error:
            ended = str(error)
            break
        before, slowest = length, time.perf_counter() - start
        taken[length] = memory.peak - memory.baseline
    return {"name": name, "bytes": taken, "ended": ended}


def main(job: dict[str, Any]) -> None:
    """The process that measures memory: one line of JSON per name."""
    torch.set_num_threads(job["threads"])
    for name in job["names"]:
        sys.stdout.write(json.dumps(_measure_memory(job, name)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
