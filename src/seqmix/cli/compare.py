"""Compare architectures on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seqmix.cli._terminal import DATA, Json, print_json, print_text, work


def run(
    data: Annotated[str, typer.Option(help=DATA)],
    candidates: Annotated[
        str,
        typer.Option(
            help="Layouts with ';' between them, e.g. 'attention; 3x[mamba2], attention'."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the study, the models and report.html.")],
    budget: Annotated[
        str | None, typer.Option(help="Limits, e.g. 'decode_ms<2@8192, memory_mb<400'.")
    ] = None,
    equal: Annotated[
        str,
        typer.Option(help="What every candidate gets the same of: parameters, tokens or seconds."),
    ] = "tokens",
    preset: Annotated[str, typer.Option(help="quick (minutes) or standard.")] = "quick",
    seeds: Annotated[int, typer.Option(help="Trainings per candidate, for the spread.")] = 1,
    storage: Annotated[
        str | None,
        typer.Option(help="Optuna storage, e.g. postgresql://...; SQLite in --out by default."),
    ] = None,
    json: Json = False,
) -> None:
    """Train and measure candidate architectures, and recommend one for a budget.

    After Ctrl-C, or if the machine went down, the same command goes on; several processes with the same
    command share the work.

    Example: `seqmix compare --data shakespeare --candidates "attention; mamba2; 3x[mamba2], attention"
    --budget "decode_ms<2@8192" --out runs/first`
    """
    from seqmix.measure.compare import compare

    with work(resume=f"The same command goes on after the last finished candidate in {out}."):
        comparison = compare(
            data,
            candidates,
            budget=budget,
            equal=equal,
            preset=preset,
            out=out,
            storage=storage,
            seeds=seeds,
        )
    if json:
        print_json(comparison.to_dict())
    else:
        print_text(str(comparison))
