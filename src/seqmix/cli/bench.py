"""Time every form of the operators, and their peers."""

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
    form: Annotated[list[str] | None, typer.Option(help="Forms; all by default.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Timing cases; all by default.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32 or bfloat16; both by default.")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Lengths of the curves, 0 for none; 128 to 16384 by default."),
    ] = None,
    floors: Annotated[
        bool, typer.Option("--floors", help="Measure the speeds to reach instead: OUT/speed.json.")
    ] = False,
    server: Annotated[
        list[str] | None,
        typer.Option(
            help="Servers of OpenAI's API to time instead, NAME=URL: OUT/serving.json.",
            show_default=False,
        ),
    ] = None,
    streams: Annotated[
        list[int] | None,
        typer.Option(
            help="Requests to servers at once; 1, 8 and 32 by default.", show_default=False
        ),
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of their prompts, about; 128 by default.", show_default=False),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds with servers, after one that warms up.")
    ] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short texts and few repeats: shows that it runs.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Seconds per measurement.")] = 0.5,
    threads: Annotated[
        int | None, typer.Option(help="Threads; what torch takes by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.html.")] = Path(
        "runs/bench"
    ),
    json: Json = False,
) -> None:
    """Time every form of the operators, forward and forward with backward, beside a matrix product.

    A form that disagrees with the operator's definition gets no time. The page shows time and memory against
    length, with torch's attention, the references of transformers and mambapy where they are installed. After
    Ctrl-C the same command goes on.

    With `--server`, the decoding of servers that already run is timed, each in turn.

    Example: `seqmix bench linear_attention --dtype float32 --length 512 --length 2048`, or
    `seqmix bench --server ours=http://127.0.0.1:8000/v1 --server theirs=http://127.0.0.1:8001/v1`
    """
    import torch

    from seqmix.measure.benchmark import Choice, measure_floors, measure_table
    from seqmix.measure.curves import LENGTHS

    if server:
        _time_servers(server, streams or [1, 8, 32], prompt_tokens or [128], rounds, out, json)
        return
    if threads is not None:
        torch.set_num_threads(threads)
    options: dict[str, Any] = {"operators": operators, "forms": form, "cases": case}
    options |= {"dtypes": dtype} if dtype else {}
    lengths = [n for n in length if n] if length else list(LENGTHS)
    if quick:
        lengths = lengths if length else [64, 128]
        options = {"dtypes": ["float32"]} | options | {"matmul_size": 256, "shrink": 32}
        seconds = min(seconds, 0.02)
    choice = Choice(**options, lengths=lengths, seconds=seconds)
    with work(resume="The same command goes on after the last finished measurement."):
        if floors:
            record = measure_floors(choice, out=out, say=say)
        else:
            record = measure_table(choice, out=out, wrong=disagreement, say=say)
            _write_page(record, out / "bench.html")
    if json:
        print_json(record)
    elif floors:
        print_floors(record)
        say(f"Wrote {out / 'speed.json'}")
    else:
        from seqmix.report.bench import COLUMNS, cells, summary_lines

        print_text("\n".join(summary_lines(record)))
        print_table(COLUMNS, [cells(row) for row in record["rows"]])
        say(f"Wrote {out / 'bench.json'} and {out / 'bench.html'}")


def _time_servers(
    servers: list[str],
    streams: list[int],
    prompt_tokens: list[int],
    rounds: int,
    out: Path,
    json: bool,
) -> None:
    from seqmix.data.text import read_text
    from seqmix.measure.serving import Server, Workload, measure_servers
    from seqmix.report.bench import SERVING_COLUMNS, serving_cells

    workloads = [
        Workload(streams=n, prompt_tokens=tokens) for tokens in prompt_tokens for n in streams
    ]
    named = [Server.parse(each) for each in servers]
    text = "\n".join(read_text("austen").documents)
    with work(resume="The same command measures again."):
        record = measure_servers(named, workloads, text, out=out, rounds=rounds, say=say)
    if json:
        print_json(record)
    else:
        print_table(SERVING_COLUMNS, [serving_cells(row) for row in record["rows"]])
        say(f"Wrote {out / 'serving.json'}")


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


def _write_page(record: dict[str, Any], path: Path) -> None:
    from seqmix.core.files import write_text
    from seqmix.report.bench import render

    write_text(path, render(record))


def print_floors(record: dict[str, Any]) -> None:
    """The speeds to reach, as a table on stdout."""
    from seqmix.report.bench import FLOOR_COLUMNS, floor_cells, summary_lines

    print_text("\n".join(summary_lines(record)))
    print_table(FLOOR_COLUMNS, [floor_cells(row) for row in record["floors"]])
