"""The report of a compression: what every step took and saved, the frontier of a search, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seqmix.report import page
from seqmix.report.plots import pareto

Values = Mapping[str, Any]
COLUMNS = {  # figure -> its title
    "size_mb": "size (MiB)",
    "parameters": "parameters",
    "flops": "FLOPs of a token",
    "prefill_ms": "prefill (ms)",
    "decode_ms": "decode (ms)",
    "state_mb": "state (MiB)",
    "loss": "loss (nats)",
    "perplexity": "perplexity",
    "zero_shot": "zero-shot",
    "passkey": "passkey",
}


def render(record: Values) -> str:
    """The HTML page of a record of `seqmix.compress`."""
    steps = record["steps"]
    last = steps[-1]["relative"]
    shares = [
        f"{title.partition(' (')[0]} {last[name]:.2f}x"
        for name, title in COLUMNS.items()
        if name in ("size_mb", "flops", "prefill_ms", "decode_ms", "loss", "zero_shot")
        and name in last
    ]
    lead = [
        page.paragraph(
            f"{record['recipe'] or 'The original'}: {', '.join(shares)}.", kind="answer"
        ),
        page.paragraph(
            "Each figure is beside that of the original, x for times; times are medians of calls in turn, for "
            f"one text of {record['arguments']['context']} tokens in float32 on this machine.",
            kind="note",
        ),
    ]
    sections = [
        page.Section("Step by step", [_figures(steps), _shares(steps), _plot(steps)]),
        page.Section("What the steps found", _notes(steps)),
    ]
    if record["frontier"]:
        sections.insert(0, page.Section("Recipes within reach", _frontier(record["frontier"])))
    if record["needs"]:
        columns = ["step", "tokens read", "tokens trained on", "predicted seconds", "MiB beside it"]
        names = ("step", "forward_tokens", "training_tokens", "seconds", "memory_mb")
        rows = [[row[name] for name in names] for row in record["needs"]]
        sections.append(page.Section("What was needed", [page.table(columns, rows)]))
    for title in ("arguments", "data", "machine"):
        shown = page.table(["", ""], page.rows_of(record[title]))
        sections.append(page.Section(title.capitalize(), [shown]))
    return page.render_page(f"{record['arguments']['model']}, cheaper", sections, lead=lead)


def _name(step: Values) -> str:
    return step["recipe"].rpartition("|")[2].strip() or "original"


def _figures(steps: Sequence[Values]) -> str:
    known = [name for name in COLUMNS if name in steps[0]["figures"]]
    rows = [
        [_name(step), *(step["figures"][name] for name in known), round(step["seconds"])]
        for step in steps
    ]
    return page.table(["after", *(COLUMNS[name] for name in known), "seconds taken"], rows)


def _shares(steps: Sequence[Values]) -> str:
    known = [name for name in COLUMNS if name in steps[0]["relative"]]
    rows = [
        [_name(step), *(f"{step['relative'][name]:.3f}x" for name in known)] for step in steps[1:]
    ]
    return page.table(["after", *(COLUMNS[n].partition(" (")[0] for n in known)], rows)


def _plot(steps: Sequence[Values]) -> str:
    """Quality over each kind of cost, from the original to the last step."""

    def variant(cost: str) -> dict[str, Any]:
        line = {
            "type": "scatter",
            "mode": "lines+markers+text",
            "x": [step["relative"][cost] for step in steps],
            "y": [step["relative"]["loss"] for step in steps],
            "text": [_name(step) for step in steps],
            "textposition": "top center",
            "hovertemplate": "<b>%{text}</b><br>%{x:.3f}x, loss %{y:.3f}x<extra></extra>",
        }
        axes = {
            "xaxis": {"title": {"text": f"{COLUMNS[cost]}, times the original"}},
            "yaxis": {"title": {"text": "held-out loss, times the original"}},
            "showlegend": False,
        }
        return {"data": [line], "layout": axes}

    costs = [
        name
        for name in ("decode_ms", "prefill_ms", "size_mb", "flops")
        if name in steps[0]["relative"]
    ]
    return page.figure({COLUMNS[cost]: variant(cost) for cost in costs}, label="Cost")


def _notes(steps: Sequence[Values]) -> list[str]:
    parts = []
    for step in steps[1:]:
        rows = page.rows_of(step["notes"])
        shown = rows[:60]
        parts.append(page.paragraph(step["recipe"]))
        if shown:
            parts.append(page.table(["", ""], shown))
        if len(rows) > len(shown):
            parts.append(
                page.paragraph(f"{len(rows) - len(shown)} more in result.json", kind="note")
            )
    return parts or [page.paragraph("No step was taken.")]


def _frontier(found: Values) -> list[str]:
    metrics, worked = found["metrics"], [t for t in found["trials"] if not t["failed"]]
    worked = sorted(worked, key=lambda trial: trial["relative"][metrics[0]])
    marked = [i for i, trial in enumerate(worked) if trial["recipe"] == found["chosen"]]
    rows = [
        [
            trial["recipe"],
            *(f"{trial['relative'][metric]:.3f}x" for metric in metrics),
            "frontier" if trial["recipe"] in found["frontier"] else "",
            "yes" if not trial["excess"] else "no",
        ]
        for trial in worked
    ]
    parts = [page.table(["recipe", *metrics, "", "within the budget"], rows, marked=marked)]
    alone = [[row["recipe"], row["dominated by"] or "none"] for row in found["methods"]]
    parts.append(page.table(["method alone", "combination on the frontier that beats it"], alone))
    if len(metrics) > 1:
        across, up = metrics[:2]
        points = [(t["relative"][across], t["relative"][up]) for t in worked]
        best = pareto(points)
        data = [
            {
                "type": "scatter",
                "mode": "lines",
                "x": [points[i][0] for i in best],
                "y": [points[i][1] for i in best],
                "line": {"dash": "dot", "color": "#888888"},
                "hoverinfo": "skip",
                "showlegend": False,
            },
            {
                "type": "scatter",
                "mode": "markers",
                "x": [x for x, _ in points],
                "y": [y for _, y in points],
                "text": [trial["recipe"] for trial in worked],
                "hovertemplate": "%{text}<br>%{x:.3f}x, %{y:.3f}x<extra></extra>",
                "showlegend": False,
            },
        ]
        axes = {
            "xaxis": {"title": {"text": f"{across}, times the original"}},
            "yaxis": {"title": {"text": f"{up}, times the original"}},
        }
        parts.append(page.figure({"frontier": {"data": data, "layout": axes}}))
    failed = [[t["recipe"], t["failed"]] for t in found["trials"] if t["failed"]]
    if failed:
        parts += [page.paragraph("These cannot be applied:"), page.table(["recipe", "why"], failed)]
    return parts
