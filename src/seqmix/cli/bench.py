"""Time every form of the operators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from seqmix.cli._terminal import Json, print_json, print_table, print_text, say, work


def run(
    operators: Annotated[
        list[str] | None,
        typer.Argument(help="Operators; all of them by default.", show_default=False),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds per measurement.")] = 0.5,
    threads: Annotated[
        int | None, typer.Option(help="Threads; what torch takes by default.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the result as a page.")] = None,
    json: Json = False,
) -> None:
    """Time every form of the operators on their timing cases, forward and forward with backward.

    A form that disagrees with the operator's definition gets no time. Ratios are to the first form of the
    same case and run: below 1 is faster.

    Example: `seqmix bench linear_attention --json`
    """
    import torch

    from seqmix.measure.machine import describe
    from seqmix.ops import OPERATORS

    if threads is not None:
        torch.set_num_threads(threads)
    with work(resume="Nothing is kept of a benchmark: the same command starts again."):
        rows = [
            row
            for name in operators or OPERATORS.names()
            for row in time_operator(OPERATORS.get(name), seconds=seconds)
        ]
    record: dict[str, Any] = {
        "machine": describe(),
        "seconds_per_measurement": seconds,
        "rows": rows,
    }
    if html is not None:
        from seqmix.core.files import write_text

        write_text(html, page(record))
        say(f"Wrote {html}")
    if json:
        print_json(record)
        return
    machine = record["machine"]
    print_text(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}"
    )
    print_table(COLUMNS, [cells(row) for row in rows])


def time_operator(operator: Any, *, seconds: float) -> list[dict[str, Any]]:
    """One record per timing case, form and pass: median and quartiles in ms, or why there is no time."""
    wrong = {form: disagreement(operator, form) for form in operator.forms}
    rows = []
    for case in operator.timing:
        say(f"{operator.name} {case.name}")
        first: dict[str, float] = {}
        for form in operator.forms:
            for passes in ("forward", "forward and backward"):
                row = {"operator": operator.name, "case": case.name, "form": form, "pass": passes}
                row["sizes"] = dict(case.sizes)
                if wrong[form]:
                    row["skipped"] = f"disagrees with the definition: {wrong[form]}"
                elif passes != "forward" and not operator.forms[form].trains:
                    row["skipped"] = "has no backward"
                else:
                    row |= _time(operator, form, case, passes, seconds)
                if "median_ms" in row:
                    row["ratio"] = row["median_ms"] / first.setdefault(passes, row["median_ms"])
                rows.append(row)
    return rows


def disagreement(operator: Any, form: str) -> str | None:
    """None if the form agrees with the definition on every small case, forward and backward; else where not."""
    from seqmix.testing._trials import Inapplicable
    from seqmix.testing.operators import agrees_with_definition

    for case in operator.cases:
        try:
            agrees_with_definition(operator, form, case)
        except Inapplicable:
            continue  # too long for this form, in every size
        except AssertionError as error:
            return f"{case.name}: {error}"
    return None


def _time(operator: Any, form: str, case: Any, passes: str, seconds: float) -> dict[str, Any]:
    import torch

    from seqmix.core.errors import NoUsableForm
    from seqmix.measure.timing import time_calls

    inputs = operator.sample(case, torch.Generator().manual_seed(0))
    names = [name for name in operator.axes if isinstance(inputs.get(name), torch.Tensor)]
    variables = [inputs[name] for name in names]

    def forward() -> torch.Tensor:
        result = operator.function(**inputs, form=form)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def forward_and_backward() -> None:
        torch.autograd.grad(forward(), variables, cotangent, allow_unused=True)

    try:
        with torch.no_grad():
            cotangent = torch.randn_like(forward())
        if passes == "forward":
            with torch.inference_mode():
                timing = time_calls(forward, seconds=seconds, warmup=2)
        else:
            for variable in variables:
                variable.requires_grad_()
            timing = time_calls(forward_and_backward, seconds=seconds, warmup=2)
    except NoUsableForm as error:
        return {"skipped": error.rejected[form]}
    timing = timing.scaled(1e3)
    return {
        "median_ms": timing.median,
        "low_ms": timing.low,
        "high_ms": timing.high,
        "repeats": timing.repeats,
    }


COLUMNS = ["operator", "case", "form", "pass", "median ms", "ratio", "quartiles (repeats)"]


def cells(row: dict[str, Any]) -> list[str]:
    """A record as the cells of a table."""
    start = [row["operator"], row["case"], row["form"], row["pass"]]
    if "skipped" in row:
        return [*start, "-", "-", row["skipped"]]
    quartiles = f"{row['low_ms']:.3g} - {row['high_ms']:.3g} ({row['repeats']})"
    return [*start, f"{row['median_ms']:.3g}", f"{row['ratio']:.2f}", quartiles]


def page(record: dict[str, Any]) -> str:
    """The record as one self-contained HTML page."""
    from html import escape

    def line(tag: str, values: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values) + "</tr>"

    machine = record["machine"]
    about = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}"
    body = "\n".join(line("td", cells(row)) for row in record["rows"])
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Operators: time</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        "<style>body{font:15px system-ui;margin:2em}td,th{padding:.2em .8em;text-align:left}"
        "table{display:block;overflow-x:auto}tr:nth-child(even){background:#8881}</style>\n"
        f"<h1>Time of every form</h1><p>{escape(about)}</p>\n"
        "<p>Median and quartiles in milliseconds; ratio to the first form of the same case.</p>\n"
        f"<table>{line('th', COLUMNS)}\n{body}</table></html>\n"
    )
