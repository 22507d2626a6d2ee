"""What every command shares: where its answer, its progress and its errors go, and common options."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

answers = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, data order and sampling.")]
FILE_WIDTH = 160  # of a table that goes to a file or a pipe
MODEL = "A folder, a Hugging Face hub name or an asset name such as smollm2-135m."
DATA = "A text file, a folder of texts or a corpus such as shakespeare."


class Interrupted(Exception):
    """Ctrl-C during work; the message says how to go on."""


@contextlib.contextmanager
def work(*, resume: str) -> Iterator[None]:
    """A long computation: what it prints goes to stderr, so that stdout holds the answer alone.

    Ctrl-C inside becomes `Interrupted` with `resume`, one sentence on how to go on.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {resume}") from None


def say(line: str) -> None:
    """One line of progress, on stderr."""
    errors.print(line, highlight=False, markup=False)


def print_text(text: str) -> None:
    """Text as it is, on stdout."""
    answers.print(text, highlight=False, markup=False)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout; numbers that are not finite become null."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None
) -> None:
    """A table on stdout; numbers are aligned to the right, and only the last column folds."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        numbers = all(isinstance(row[i], int | float) for row in rows)
        last = i == len(columns) - 1
        justify: Literal["left", "right"] = "right" if numbers and rows else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=not last)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    print_rich(table)


def print_rich(table: Table) -> None:
    """A table on stdout, as wide as the terminal, or wide enough in a file."""
    width = None if sys.stdout.isatty() else FILE_WIDTH
    Console(highlight=False, markup=False, width=width).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
