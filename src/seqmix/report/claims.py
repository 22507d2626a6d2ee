"""The report of claims: what papers say, what was expected of it, and what was measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seqmix.report import page

Values = Mapping[str, Any]
FIELDS = ("id", "title", "paper", "where", "claimed", "size", "verdict", "findings", "seconds")


def render(records: Sequence[Values]) -> str:
    """The HTML page of records of `seqmix reproduce`."""
    columns = ["claim", "paper", "verdict here"]
    rows = [[record["id"], record["title"], record["verdict"]] for record in records]
    sections = [page.Section("All", [page.table(columns, rows)])]
    sections += [page.Section(record["id"], _parts(record)) for record in records]
    lead = [
        page.paragraph(
            "What papers claim, measured here. A claim that does not hold here stays, with its evidence.",
            kind="note",
        )
    ]
    return page.render_page("Claims", sections, lead=lead)


def _parts(record: Values) -> list[str]:
    columns = ["statement", "expected", "measured", "verdict"]
    rows = [
        [
            finding["statement"],
            finding["expected"],
            "; ".join(f"{name} {value}" for name, value in page.rows_of(finding["measured"])),
            finding["verdict"],
        ]
        for finding in record["findings"]
    ]
    source = f"{record['title']} ({record['paper']}, {record['where']})"
    run = f"{record['size']} size, {record['seconds']:.0f} s: {record['verdict']}"
    return [
        page.paragraph(source, kind="note"),
        page.paragraph(f"Claimed: {record['claimed']}."),
        page.paragraph(run, kind="answer"),
        page.table(columns, rows),
    ]
