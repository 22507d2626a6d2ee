"""Measure a paper's claim here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from seqmix.cli._describe import list_entries
from seqmix.cli._terminal import Json, print_json, print_table, print_text, say, work
from seqmix.core.errors import ConfigError


def run(
    claim: Annotated[
        str | None, typer.Argument(help="The id of a claim, as `--list` shows.", show_default=False)
    ] = None,
    size: Annotated[
        str, typer.Option(help="full (minutes) or quick (seconds; its verdicts mean little).")
    ] = "full",
    out: Annotated[Path, typer.Option(help="Folder for the record, ID.json.")] = Path(
        "runs/claims"
    ),
    list_claims: Annotated[bool, typer.Option("--list", help="List the claims and exit.")] = False,
    json: Json = False,
) -> None:
    """Measure a paper's claim here: reproduced, not reproduced or inconclusive.

    Example: `seqmix reproduce gated-linear-attention --size quick`
    """
    from seqmix.claims import reproduce

    if list_claims:
        entries = list_entries("claims")
        if json:
            print_json({"claims": entries})
        else:
            print_table(["claim", ""], [[e["name"], e["description"]] for e in entries])
        return
    if claim is None:
        raise ConfigError("No claim was named. `seqmix reproduce --list` shows their ids.")
    with work(resume="The same command goes on after the last finished step."):
        record = reproduce(claim, size=size, out=out, say=say)
    if json:
        print_json(record)
    else:
        _print(record, out)


def _print(record: dict[str, Any], out: Path) -> None:
    print_text(f"{record['title']} ({record['paper']}, {record['where']})\n{record['claimed']}\n")
    for finding in record["findings"]:
        measured = ", ".join(f"{name} {value}" for name, value in finding["measured"].items())
        print_text(f"{finding['verdict'].upper()}: {finding['statement']}")
        print_text(f"  expected: {finding['expected']}\n  measured: {measured}\n")
    print_text(f"{record['verdict'].upper()} at size {record['size']} in {record['seconds']:.0f} s")
    print_text(f"Record: {out / (record['id'] + '.json')}")
