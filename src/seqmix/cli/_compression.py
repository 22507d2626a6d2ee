"""What `compress` and `convert` answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seqmix.cli._terminal import print_json, print_table, print_text

if TYPE_CHECKING:
    from seqmix.search import Compressed

SHOWN = ("size_mb", "flops", "prefill_ms", "decode_ms", "loss", "zero_shot", "passkey")


def answer(made: Compressed, *, json: bool) -> None:
    """The figures of every step, or one JSON object."""
    if json:
        print_json(made.to_dict() | {"folder": str(made.folder), "report": str(made.report)})
        return
    names = [name for name in SHOWN if name in made.steps[0]["figures"]]
    rows = []
    for step in made.steps:
        shares = step["relative"]
        cells = [
            f"{step['figures'][name]:.4g} ({shares[name]:.2f}x)"
            if name in shares
            else f"{step['figures'][name]:.4g}"
            for name in names
        ]
        rows.append([step["recipe"].rpartition("|")[2].strip() or "original", *cells])
    print_table(["after", *names], rows)
    print_text(f"\nCheckpoint: {made.folder}\nReport: {made.report}")
