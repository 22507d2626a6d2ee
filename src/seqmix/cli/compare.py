"""Compare architectures on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seqmix.cli._terminal import DATA, Json, print_json, print_rich, print_text, work
from seqmix.core.errors import ConfigError

PRESET = "the preset's by default"


def run(
    data: Annotated[str, typer.Option(help=DATA)],
    candidates: Annotated[
        str,
        typer.Option(
            help="Layouts with ';' between them, e.g. 'attention; 3x[mamba2], attention'."
        ),
    ],
    budget: Annotated[
        str | None, typer.Option(help="Limits, e.g. 'decode_ms<2@8192, memory_mb<400'.")
    ] = None,
    equal: Annotated[
        str,
        typer.Option(help="What all have the same of: parameters or width, and tokens or seconds."),
    ] = "parameters, tokens",
    preset: Annotated[str, typer.Option(help="quick (minutes) or standard (hours).")] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the study and report.html [runs/compare-DATA].")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Optuna storage, e.g. postgresql://...; SQLite in --out by default."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings per candidate, for the spread.")] = 1,
    width: Annotated[int | None, typer.Option(help=f"Width; {PRESET}.")] = None,
    depth: Annotated[int | None, typer.Option(help=f"Blocks; {PRESET}.")] = None,
    heads: Annotated[int | None, typer.Option(help=f"Heads; {PRESET}.")] = None,
    length: Annotated[int | None, typer.Option(help=f"Tokens per row; {PRESET}.")] = None,
    batch: Annotated[int | None, typer.Option(help=f"Rows per step; {PRESET}.")] = None,
    tokens: Annotated[int | None, typer.Option(help=f"Training tokens of each; {PRESET}.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help=f"Training seconds of each; {PRESET}.")
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(help="Parameters of each; those of attention by default.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help=f"Peak; {PRESET}.")] = None,
    contexts: Annotated[
        str | None, typer.Option(help=f"Contexts to measure at, e.g. '512,8192'; {PRESET}.")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="bytes, bpe:SIZE or a folder.")] = "bytes",
    allow_other_machine: Annotated[
        bool, typer.Option("--allow-other-machine", help="Go on with a study of another machine.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed candidates again.")
    ] = False,
    json: Json = False,
) -> None:
    """Train and measure candidate architectures, and recommend one for a budget.

    After Ctrl-C, or if the machine went down, the same command goes on; several processes with the same
    command share the work.

    Example: `seqmix compare --data shakespeare --candidates "attention; mamba2; 3x[mamba2], attention"
    --budget "decode_ms<2@8192" --out runs/first`
    """
    from seqmix.measure.compare import compare

    with work(resume="The same command goes on after the last finished candidate."):
        comparison = compare(
            data,
            candidates,
            budget=budget,
            equal=equal,
            preset=preset,
            out=out,
            storage=storage,
            seeds=seeds,
            width=width,
            depth=depth,
            heads=heads,
            length=length,
            batch=batch,
            tokens=tokens,
            seconds=seconds,
            parameters=parameters,
            learning_rate=learning_rate,
            contexts=_numbers(contexts),
            tokenizer=tokenizer,
            allow_other_machine=allow_other_machine,
            retry_failed=retry_failed,
        )
    if json:
        print_json(comparison.to_dict())
        return
    print_rich(comparison.table())
    print_text(f"\n{comparison.recommendation['reason']}\nReport: {comparison.report}")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(
            f"contexts={text!r}, wanted numbers with commas between, such as 512,8192."
        )
    return [int(word) for word in words]
