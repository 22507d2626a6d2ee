"""Figures of a comparison, as the plain dicts that plotly draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other is at least as good as in both coordinates (less is better), by rising x."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept


def frontier(
    rows: Sequence[Row],
    *,
    title: str,
    values: Sequence[float],
    more_is_better: bool = False,
    limit: tuple[float, str] | None = None,
    colours: Mapping[str, str],
    recommended: str | None = None,
) -> dict[str, Any]:
    """Quality over one figure of each row: the marker's area is its memory, a line joins the Pareto frontier.

    `limit` is a line of the budget, with its text.
    """
    largest = max((row["figures"]["memory_mb"] for row in rows), default=1.0) or 1.0
    data: list[dict[str, Any]] = []
    sign = -1.0 if more_is_better else 1.0
    best = pareto([(sign * x, row["quality"]) for x, row in zip(values, rows, strict=True)])
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto frontier",
            "x": [values[i] for i in best],
            "y": [rows[i]["quality"] for i in best],
            "line": {"dash": "dot", "width": 1.5, "color": "#888888"},
            "hoverinfo": "skip",
        }
    )
    for row, x in zip(rows, values, strict=True):
        area = max(row["figures"]["memory_mb"], 0.0) / largest
        name = row["candidate"]
        spread = row["quality_deviation"]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name + (" (recommended)" if name == recommended else ""),
                "x": [x],
                "y": [row["quality"]],
                "error_y": {
                    "array": [spread or 0.0],
                    "visible": spread is not None,
                    "thickness": 1,
                },
                "marker": {
                    "size": 10 + 24 * area**0.5,
                    "color": colours[name],
                    "opacity": 0.85,
                    "symbol": "star" if name == recommended else "circle",
                    "line": {"width": 1, "color": "#888888"},
                },
                "hovertemplate": (
                    f"<b>{_escaped(name)}</b><br>{title}: %{{x:.4g}}<br>bits per byte: %{{y:.3f}}"
                    f"<br>memory: {row['figures']['memory_mb']:.0f} MiB"
                    f"<br>parameters: {row['figures']['parameters']:,}<extra></extra>"
                ),
            }
        )
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": title}, "type": "log"},
        "yaxis": {"title": {"text": "bits per byte"}},
    }
    if limit is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "x0": limit[0],
                "x1": limit[0],
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": "#d55e00", "dash": "dash", "width": 1},
                "name": f"budget {limit[1]}",
                "showlegend": True,
            }
        ]
    return {"data": data, "layout": layout}


def scaling(
    series: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    title: str,
    measured: str,
    colours: Mapping[str, str],
) -> dict[str, Any]:
    """One line per candidate over the context: what was measured with its quartiles, what was predicted dashed.

    `series` maps candidate and context to a dict with `measured`, `predicted`, and `low` and `high` if known.
    """
    data: list[dict[str, Any]] = []
    for name, by_context in series.items():
        contexts = sorted(by_context, key=int)
        points = [by_context[context] for context in contexts]
        x = [int(context) for context in contexts]
        y = [point[measured] for point in points]
        common = {"type": "scatter", "x": x, "legendgroup": name}
        data.append(
            common
            | {
                "mode": "lines+markers",
                "name": name,
                "y": y,
                "line": {"color": colours[name]},
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "visible": "high" in points[0],
                    "thickness": 1,
                    "array": [p.get("high", v) - v for p, v in zip(points, y, strict=True)],
                    "arrayminus": [v - p.get("low", v) for p, v in zip(points, y, strict=True)],
                },
            }
        )
        if all("predicted" in point for point in points):
            data.append(
                common
                | {
                    "mode": "lines",
                    "name": f"{name}, predicted",
                    "showlegend": False,
                    "y": [point["predicted"] for point in points],
                    "line": {"color": colours[name], "dash": "dash", "width": 1},
                }
            )
    positive = all(value > 0 for trace in data for value in trace["y"])
    contexts = sorted({context for trace in data for context in trace["x"]})
    layout = {
        "xaxis": {
            "title": {"text": "context (tokens)"},
            "type": "log",
            "tickvals": contexts,
            "ticktext": [str(context) for context in contexts],
        },
        "yaxis": {"title": {"text": title}, "type": "log" if positive else "linear"}
        | ({"dtick": "D2"} if positive else {}),
    }
    return {"data": data, "layout": layout}


def loss_curves(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    *,
    over: str,
    colours: Mapping[str, str],
) -> dict[str, Any]:
    """Training loss over `tokens` or `seconds`, one line per candidate and seed."""
    data = []
    for name, seeds in curves.items():
        for number, history in enumerate(seeds):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": name,
                    "legendgroup": name,
                    "showlegend": number == 0,
                    "opacity": 1.0 if number == 0 else 0.5,
                    "x": [point[over] for point in history],
                    "y": [point["loss"] for point in history],
                    "line": {"color": colours[name], "width": 1.5},
                }
            )
    layout = {
        "xaxis": {"title": {"text": f"training {over}"}},
        "yaxis": {"title": {"text": "training loss (nats per token)"}},
    }
    return {"data": data, "layout": layout}


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
