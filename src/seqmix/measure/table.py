"""The table of a comparison in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text


def comparison_table(
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    recommendation: Mapping[str, Any],
) -> Table:
    """One row per candidate, best quality first; `*` marks the recommended one, failures stand below."""
    longest = str(max(settings["contexts"]))
    table = Table(
        box=None, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left", caption_style=""
    )
    table.add_column("candidate", overflow="fold", min_width=18)
    table.add_column("bits/\nbyte", justify="right", no_wrap=True)
    table.add_column("para-\nmeters", justify="right", no_wrap=True)
    table.add_column(f"decode ms\n@{longest}", justify="right", no_wrap=True)
    table.add_column(f"prefill tok/s\n@{longest}", justify="right", no_wrap=True)
    table.add_column("train\ntok/s", justify="right", no_wrap=True)
    table.add_column("memory\nMiB", justify="right", no_wrap=True)
    table.add_column("budget", overflow="fold")
    failures = []
    for row in sorted(rows, key=lambda row: row.get("quality", float("inf"))):
        best = row["candidate"] == recommendation["candidate"]
        name = Text(("* " if best else "  ") + row["candidate"], style="bold" if best else "")
        failures += [
            f"{row['candidate']}, seed {f['seed']}: {f['reason']}" for f in row["failures"]
        ]
        if not row["seeds"]:
            table.add_row(name, *["-"] * 6, "failed")
            continue
        figures = row["figures"]
        table.add_row(
            name,
            quality(row),
            f"{figures['parameters'] / 1e6:.2f}M",
            f"{figures['decode_ms'][longest]:.2f}",
            f"{figures['prefill_tokens_s'][longest]:,.0f}",
            f"{figures['train_tokens_s']:,.0f}",
            f"{figures['memory_mb']:.0f}",
            Text(verdict(row)),
        )
    if failures:
        table.caption = Text("\n".join(["Failed:", *failures]))
    return table


def quality(row: Mapping[str, Any]) -> str:
    """Mean bits per byte, with the standard deviation where there are several seeds."""
    deviation = row["quality_deviation"]
    return f"{row['quality']:.3f}" + ("" if deviation is None else f" ±{deviation:.3f}")


def verdict(row: Mapping[str, Any]) -> str:
    """`meets`, or the terms that are missed with their figures."""
    missed = ", ".join(f"{miss['term']} ({miss['value']:.3g})" for miss in row["missed"])
    return f"misses {missed}" if missed else "meets"
