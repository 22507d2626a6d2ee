"""The table of `seqmix bench`: every form of every operator on its timing cases, beside a matrix product.

FLOPs are those of the operator's own cost model (three times for forward and backward), whatever a form
really does, so that rates of forms compare. Only a form that is right gets a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqmix.core.errors import NoUsableForm
from seqmix.measure.calls import DTYPES, PASSES, Call, call, disagreement, draw, exactly
from seqmix.measure.timing import Timing, time_in_turn
from seqmix.ops import Case
from seqmix.ops._operator import Operator

Row = dict[str, Any]
MATMUL = "matmul"
MATMUL_SIZE = 2048


def matmul(dtype: torch.dtype = torch.float32, size: int = MATMUL_SIZE) -> Callable[[], object]:
    """A product of square matrices: the speed that arithmetic can have on this machine."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    out = torch.empty(size, size, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def time_case(
    operator: Operator,
    case: Case,
    dtype: str,
    *,
    wrong: Callable[[str], str | None],
    seconds: float,
    matmul_size: int = MATMUL_SIZE,
) -> list[Row]:
    """One record per form and pass: median and quartiles in ms and FLOP rates, or why there is no time.

    `wrong(form)` says what is wrong with a form on the operator's small cases, forward and backward. Here it
    is compared once more, on the timed inputs. All forms and the matrix product take turns.
    """
    inputs = draw(operator, case, DTYPES[dtype])
    exact = exactly(operator, inputs)
    refused: dict[tuple[str, str], str] = {}
    calls: dict[str, Call] = {}
    for form in operator.forms:
        made = call(operator, inputs, form)
        trains = operator.forms[form].trains
        reason = wrong(form)
        if reason:
            reason = f"disagrees with the definition: {reason}"
        else:
            try:
                reason = disagreement(made, exact, DTYPES[dtype], gradients=trains)
                reason = f"wrong on the timed inputs: {reason}" if reason else None
            except NoUsableForm as error:
                reason = error.rejected[form]
        for passes in PASSES:
            if reason:
                refused[form, passes] = reason
            elif passes != "forward" and not trains:
                refused[form, passes] = "has no backward"
        if reason is None:
            calls[form] = made
    rows = []
    flops = operator.cost(case).flops
    product = {MATMUL: matmul(size=matmul_size)} if calls else {}
    for passes in PASSES:
        timed = {f: c.timed(passes) for f, c in calls.items() if (f, passes) not in refused}
        timings = time_in_turn({**timed, **product}, seconds=seconds, warmup=2)
        first: Timing | None = None
        for form in operator.forms:
            row: Row = {"operator": operator.name, "case": case.name, "form": form, "pass": passes}
            row |= {"dtype": dtype, "sizes": dict(case.sizes)}
            if form not in timings:
                row["skipped"] = refused[form, passes]
            else:
                timing = timings[form]
                first = first or timing
                work = flops * (1 if passes == "forward" else 3)
                peak = 2 * matmul_size**3 / timings[MATMUL].median
                row |= milliseconds(timing) | {
                    "ratio": timing.median / first.median,
                    "gflops": work / timing.median / 1e9,
                    "of_matmul": work / timing.median / peak,
                }
            rows.append(row)
    return rows


def milliseconds(timing: Timing) -> Row:
    """A timing as fields of a record."""
    timing = timing.scaled(1e3)
    return {
        "median_ms": timing.median,
        "low_ms": timing.low,
        "high_ms": timing.high,
        "repeats": timing.repeats,
    }
