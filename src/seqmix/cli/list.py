"""List what there is."""

from __future__ import annotations

from typing import Annotated

import typer

from seqmix.cli._describe import KINDS, list_entries
from seqmix.cli._terminal import Json, print_json, print_table, print_text


def run(
    kind: Annotated[
        str | None, typer.Argument(help=f"One of {', '.join(KINDS)}; all of them by default.")
    ] = None,
    json: Json = False,
) -> None:
    """List mixers, channel mixers, operators, tasks, objectives, transforms, claims or corpora, with one line on each.

    Example: `seqmix list mixers`
    """
    listed = {name: list_entries(name) for name in ([kind] if kind else KINDS)}
    if json:
        print_json(listed)
        return
    for name, entries in listed.items():
        print_table([name, ""], [[entry["name"], entry["description"]] for entry in entries])
        print_text("")
