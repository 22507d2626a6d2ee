"""The page of `seqmix bench`: time and memory against length, every form on its cases, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seqmix.report import page, plots

Values = Mapping[str, Any]
FLOOR_COLUMNS = ["what", "against", "at least", "measured", "reached", "what limits it"]
PAGE_BYTES = 4096  # what takes less is drawn as this much, so that the axis can be logarithmic
COLUMNS = ["operator", "case", "form", "pass", "dtype", "median ms", "ratio", "GFLOP/s"]
COLUMNS += ["of a matmul", "quartiles (repeats)"]

SERVING_COLUMNS = ["server", "streams", "prompt tokens", "new tokens", "first token, ms"]
SERVING_COLUMNS += ["per token, ms", "tokens/s of all"]


def serving_cells(row: Values) -> list[Any]:
    """A row of `seqmix bench --server` as its cells."""
    figures = [f"{row[name]:.3g}" for name in ("first_token_ms", "token_ms", "tokens_per_second")]
    return [*(row[name] for name in ("server", "streams", "prompt_tokens", "new_tokens")), *figures]


def render(record: Values) -> str:
    """The HTML page of the record that `seqmix bench` writes."""
    sections = []
    if any(curve["points"] for curve in record["curves"]):
        sections += [
            page.Section("Time against length", _figure(record, "time (ms)", "median_ms")),
            page.Section("Memory against length", _memory(record)),
        ]
    sections += [
        page.Section("Every form", _forms(record)),
        page.Section("Machine and versions", _machine(record)),
    ]
    left_out = [[*_place(curve), curve["name"], reason] for curve, reason in _missing(record)]
    if left_out:
        columns = ["operator", "case", "dtype", "pass", "what", "why"]
        sections.insert(-1, page.Section("Left out", [page.table(columns, left_out)]))
    return page.render_page("Operators: time and memory", sections, lead=[_lead(record)])


def cells(row: Values) -> list[Any]:
    """A record of the table as its cells."""
    start = [row["operator"], row["case"], row["form"], row["pass"], row["dtype"]]
    if "skipped" in row:
        return [*start, None, None, None, None, row["skipped"]]
    quartiles = f"{row['low_ms']:.3g} - {row['high_ms']:.3g} ({row['repeats']})"
    figures = [f"{row[name]:.3g}" for name in ("median_ms", "ratio", "gflops", "of_matmul")]
    return [*start, *figures, quartiles]


def _lead(record: Values) -> str:
    machine, roofs = record["machine"], record["roofs"]
    kernels = machine["instruction_set"] or "none"
    return page.paragraph(
        f"{machine['cpu']}, {machine['threads']} threads, compiled kernels for {kernels}; a matrix product reaches "
        f"{roofs['flops_per_second'] / 1e9:.3g} GFLOP/s, memory {roofs['bytes_per_second'] / 1e9:.3g} GB/s.",
        kind="note",
    )


def _place(curve: Values) -> list[str]:
    return [curve[name] for name in ("operator", "case", "dtype", "pass")]


def _groups(record: Values) -> dict[str, dict[str, Values]]:
    """Curves with points, by plot and name."""
    groups: dict[str, dict[str, Values]] = {}
    for curve in record["curves"]:
        if curve["points"]:
            groups.setdefault(", ".join(_place(curve)), {})[curve["name"]] = curve
    return groups


def _figure(record: Values, title: str, measured: str) -> list[str]:
    groups = _groups(record)
    names = sorted({name for group in groups.values() for name in group})
    colours = page.series_colours(names)
    variants = {}
    for plot, group in groups.items():
        series = {
            name: {str(point["length"]): _point(point) for point in curve["points"]}
            for name, curve in group.items()
        }
        variants[plot] = plots.scaling(series, title=title, measured=measured, colours=colours)
    return [page.figure(variants)]


def _point(point: Values) -> dict[str, float]:
    return {
        "median_ms": point["median_ms"],
        "low": point["low_ms"],
        "high": point["high_ms"],
        "bytes": max(point["bytes"], PAGE_BYTES),
    }


def _memory(record: Values) -> list[str]:
    bare = [
        {**curve, "points": [_without_quartiles(point) for point in curve["points"]]}
        for curve in record["curves"]
    ]
    return [
        *_figure({**record, "curves": bare}, "memory (bytes)", "bytes"),
        page.paragraph(
            "The most that one call needs beyond its inputs, in a process of its own. What needs less than a "
            "page of memory is drawn as one.",
            kind="note",
        ),
    ]


def _without_quartiles(point: Values) -> dict[str, Any]:
    """Memory has no spread: the bars of the time would stand at its points."""
    size = max(point["bytes"], PAGE_BYTES)
    return {**point, "low_ms": size, "high_ms": size}


def _missing(record: Values) -> list[tuple[Values, str]]:
    return [
        (curve, curve[name])
        for curve in record["curves"]
        for name in ("skipped", "ended")
        if curve.get(name)
    ]


def _forms(record: Values) -> list[str]:
    return [
        page.table(COLUMNS, [cells(row) for row in record["rows"]]),
        page.paragraph(
            "Median and quartiles; the ratio is to the first form of the same case, below 1 is faster. FLOPs are "
            "those of the operator's cost model, three times for forward and backward; the last ratio is to a "
            "float32 matrix product of 2048 rows and columns that took turns with the forms.",
            kind="note",
        ),
    ]


def _machine(record: Values) -> list[str]:
    about: dict[str, Any] = {"date": record["date"], **record["machine"], **record["settings"]}
    return [page.table(["", "value"], page.rows_of(about))]


def summary_lines(record: Values) -> Sequence[str]:
    """What a terminal shows above the table."""
    machine = record["machine"]
    return [
        f"{machine['cpu']}, {machine['threads']} threads, kernels for "
        f"{machine['instruction_set'] or 'none'}, torch {machine['versions']['torch']}, "
        f"commit {machine['commit'] or 'unknown'}",
        f"matrix product {record['roofs']['flops_per_second'] / 1e9:.3g} GFLOP/s, "
        f"memory {record['roofs']['bytes_per_second'] / 1e9:.3g} GB/s",
    ]


def floor_cells(floor: Values) -> list[str]:
    """A speed to reach as the cells of a row: what, against, at least, measured, reached, what limits it."""
    least = "" if floor["at_least"] is None else f"{floor['at_least']:g}x"
    start = [floor["what"], floor["against"], least]
    if "skipped" in floor:
        return [*start, "-", "not measured", floor["skipped"]]
    ratio, best = floor["ratio"], floor["best"]
    span = f"{ratio:.3g}x" if best == ratio else f"{ratio:.3g}x to {best:.3g}x"
    reached = {None: "no floor", True: "yes", False: "no"}[floor["reached"]]
    if floor["reached"] is False:
        reached = f"no, {ratio / floor['at_least']:.0%} of it at {_sizes(floor['sizes'])}"
    limits = ", ".join(f"{name} {share:.0%}" for name, share in floor["limits"].items())
    return [*start, span, reached, limits]


def _sizes(sizes: Values) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())
