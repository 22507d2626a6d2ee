"""The report of a comparison: the recommendation, the table, the plots, and what is needed to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from seqmix.report import page, plots

Values = Mapping[str, Any]
MORE_IS_BETTER = ("prefill_tokens_s", "train_tokens_s")
WELL_TRAINED = 20  # tokens per parameter (Hoffmann et al. 2022, for Transformers)
TITLES = {
    "decode_ms": "decode (ms per token)",
    "prefill_tokens_s": "prefill (tokens per second)",
    "train_tokens_s": "training (tokens per second)",
    "memory_mb": "peak memory (MiB)",
    "parameters": "parameters",
}


def render(comparison: Values) -> str:
    """The HTML page of `Comparison.to_dict()`."""
    rows = sorted(
        (row for row in comparison["summaries"] if row["seeds"]), key=lambda row: row["quality"]
    )
    sections = [page.Section("Candidates", _candidates(comparison, rows))]
    if rows:
        sections += [
            page.Section("Quality, speed and memory", _frontier(comparison, rows)),
            page.Section("Scaling with the context", _scaling(comparison)),
            page.Section("Training", _curves(comparison)),
            page.Section("Which implementation ran", _forms(comparison)),
        ]
    sections += [
        page.Section(
            "Settings", [page.table(["setting", "value"], page.rows_of(_settings(comparison)))]
        ),
        page.Section("Machine and versions", _machine(comparison)),
        page.Section("The same again", [page.preformatted(comparison["command"])]),
    ]
    recommendation = comparison["recommendation"]
    budget = f"Budget: {comparison['budget']}." if comparison["budget"] else "No budget was given."
    lead = [
        page.paragraph(recommendation["reason"], kind="answer"),
        page.paragraph(budget, kind="note"),
    ]
    return page.render_page(
        f"Which architecture for {comparison['data']['name']}?", sections, lead=lead
    )


def _candidates(comparison: Values, rows: Sequence[Values]) -> list[str]:
    longest = _longest(comparison)
    columns = ["candidate", "bits per byte", "parameters", "width x depth", f"decode ms @{longest}"]
    columns += [f"prefill tokens/s @{longest}", "training tokens/s", "memory MiB"]
    columns += [f"state MiB @{longest}", "budget"]
    lines: list[list[Any]] = []
    for row in rows:
        figures = row["figures"]
        spread = row["quality_deviation"]
        quality = f"{row['quality']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
        missed = [f"{miss['term']} ({miss['value']:.3g})" for miss in row["missed"]]
        lines.append(
            [
                row["candidate"],
                quality,
                figures["parameters"],
                f"{row['width']} x {row['depth']}",
                f"{figures['decode_ms'][longest]:.2f}",
                round(figures["prefill_tokens_s"][longest]),
                round(figures["train_tokens_s"]),
                round(figures["memory_mb"]),
                figures["state_mb"][longest],
                "misses " + ", ".join(missed) if missed else "meets",
            ]
        )
    best = comparison["recommendation"]["candidate"]
    marked = [i for i, row in enumerate(rows) if row["candidate"] == best]
    parts = [page.table(columns, lines, marked=marked)] if rows else []
    failures = [
        [row["candidate"], failure["seed"], failure["stage"], failure["step"], failure["reason"]]
        for row in comparison["summaries"]
        for failure in row["failures"]
    ]
    if failures:
        parts += [
            page.paragraph("These trials failed:"),
            page.table(["candidate", "seed", "stage", "step", "reason"], failures),
        ]
    parts += [page.paragraph(note, kind="note") for note in _training_note(comparison)]
    parts.append(
        page.paragraph(
            "Bits per byte: the validation loss; the mean over seeds ± one standard deviation where there are "
            "several. Memory: the peak of reading the longest context and decoding, in a process of its own, "
            "beyond what the imports take. State: what the model keeps of one text.",
            kind="note",
        )
    )
    return parts


def _training_note(comparison: Values) -> list[str]:
    """What the quality of a short training means, where the training was short."""
    results = [record["result"] for record in _complete(comparison)]
    read = [result["training"]["history"][-1]["tokens"] for result in results]
    ratios = [n / r["serve"]["parameters"] for n, r in zip(read, results, strict=True)]
    if not ratios or max(ratios) >= WELL_TRAINED:
        return []
    return [
        f"Training was short: {max(ratios):.2g} tokens per parameter at most, where {WELL_TRAINED} or more are "
        "usual. The ranking says how fast candidates learn at first; longer training may change it."
    ]


def _frontier(comparison: Values, rows: Sequence[Values]) -> list[str]:
    longest = _longest(comparison)
    contexts = [str(context) for context in comparison["settings"]["contexts"]]
    choices: list[tuple[str, str | None]] = [("decode_ms", longest)]
    choices += [("decode_ms", context) for context in contexts if context != longest]
    choices += [("prefill_tokens_s", context) for context in reversed(contexts)]
    choices += [("train_tokens_s", None), ("memory_mb", None), ("parameters", None)]
    variants = {}
    for metric, context in choices:
        title = TITLES[metric] + (f" at {context}" if context else "")
        values = [
            row["figures"][metric][context] if context else row["figures"][metric] for row in rows
        ]
        variants[title] = plots.frontier(
            rows,
            title=title,
            values=values,
            more_is_better=metric in MORE_IS_BETTER,
            limit=_limit(comparison, metric, context),
            colours=_colours(comparison),
            recommended=comparison["recommendation"]["candidate"],
        )
    return [
        page.figure(variants, label="Quality against"),
        page.paragraph(
            "Lower is better quality; a larger marker takes more memory. The dotted line joins the candidates "
            "that no other beats in both directions, the dashed one is the budget.",
            kind="note",
        ),
    ]


def _limit(comparison: Values, metric: str, context: str | None) -> tuple[float, str] | None:
    for term in comparison["terms"]:
        at = str(term["context"] or _longest(comparison)) if context else None
        if term["metric"] == metric and at == context:
            return term["limit"], term["text"]
    return None


def _scaling(comparison: Values) -> list[str]:
    first = {r["candidate"]: r["result"]["serve"] for r in reversed(_complete(comparison))}
    first = {row["candidate"]: first[row["candidate"]] for row in _in_order(comparison, first)}
    figures = {
        "decode (ms per token)": ("decode_ms", "median"),
        "prefill (tokens per second)": ("prefill_tokens_s", "median"),
        "state (bytes per text)": ("state_bytes", "measured"),
    }
    variants = {
        title: plots.scaling(
            {name: serve[metric] for name, serve in first.items()},
            title=title,
            measured=measured,
            colours=_colours(comparison),
        )
        for title, (metric, measured) in figures.items()
    }
    roofline = comparison["roofline"]
    return [
        page.figure(variants),
        page.paragraph(
            "Lines with markers are measured (median; bars are the quartiles), dashed lines are predicted: the "
            "cost model's operations and bytes at the speed limits of this machine, measured once for this "
            f"study by a matrix product ({roofline['flops_per_second'] / 1e9:.3g} GFLOP/s) and a copy "
            f"({roofline['bytes_per_second'] / 1e9:.3g} GB/s). The prediction has no term for the overhead of "
            "calling operators, which rules short contexts of small models.",
            kind="note",
        ),
    ]


def _curves(comparison: Values) -> list[str]:
    curves: dict[str, list[Any]] = {row["candidate"]: [] for row in comparison["summaries"]}
    for record in _complete(comparison):
        curves[record["candidate"]].append(record["result"]["training"]["history"])
    shown = {name: seeds for name, seeds in curves.items() if seeds}
    return [
        page.figure(
            {
                f"over {over}": plots.loss_curves(shown, over=over, colours=_colours(comparison))
                for over in ("tokens", "seconds")
            }
        )
    ]


def _forms(comparison: Values) -> list[str]:
    seen: dict[str, Values] = {}
    for record in _complete(comparison):
        seen.setdefault(record["candidate"], record["result"]["forms"])
    lines = []
    for name, stages in seen.items():
        operators = sorted({operator for pairs in stages.values() for operator, _ in pairs})
        for operator in operators:
            cells = [
                ", ".join(form for other, form in stages[stage] if other == operator) or "none"
                for stage in ("train", "prefill", "decode")
            ]
            lines.append([name, operator, *cells])
    return [page.table(["candidate", "operator", "training", "prefill", "decoding"], lines)]


def _settings(comparison: Values) -> dict[str, Any]:
    return {"data": comparison["data"], **comparison["settings"]}


def _machine(comparison: Values) -> list[str]:
    parts = [page.table(["", "value"], page.rows_of(comparison["machine"]))]
    records = _complete(comparison)
    machines = _distinct(records, lambda result: result["machine"]["cpu"])
    if len(machines) > 1:
        parts.append(
            page.paragraph(
                "Trials ran on different machines, so their speeds do not compare: "
                + "; ".join(machines)
            )
        )
    crowded = [r["candidate"] for r in records if r["result"]["neighbours"]]
    if crowded:
        parts.append(
            page.paragraph(
                "Another trial of this study ran on the same machine while these were measured, so their "
                "speeds are too low: " + "; ".join(crowded) + "."
            )
        )
    return parts


def _distinct(records: Sequence[Values], of: Callable[[Values], str]) -> list[str]:
    return sorted({of(record["result"]) for record in records})


def _colours(comparison: Values) -> dict[str, str]:
    """The same colour for a candidate in every plot."""
    return page.series_colours([row["candidate"] for row in comparison["summaries"]])


def _complete(comparison: Values) -> list[Values]:
    return [record for record in comparison["records"] if record["state"] == "complete"]


def _in_order(comparison: Values, names: Values) -> list[Values]:
    return [row for row in comparison["summaries"] if row["candidate"] in names]


def _longest(comparison: Values) -> str:
    return str(max(comparison["settings"]["contexts"]))
