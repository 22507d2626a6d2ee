"""A page of HTML in one file: text, tables and plots, light and dark, readable on a phone.

Parts are strings of HTML that the functions here make from plain values; every text is escaped. Plots are
figures of plotly as plain dicts; the library goes into the page once, and only where a plot is.
"""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seqmix.core.extras import require

PLOT = '<div class="plot" data-variants="'


@dataclass(frozen=True)
class Section:
    """A heading and the parts under it."""

    title: str
    parts: Sequence[str] = field(default_factory=list)


def render_page(title: str, sections: Sequence[Section], *, lead: Sequence[str] = ()) -> str:
    """The whole page; `lead` stands between the title and the first section."""
    body = [f"<h1>{html.escape(title)}</h1>", *lead]
    for section in sections:
        body += [f"<section><h2>{html.escape(section.title)}</h2>", *section.parts, "</section>"]
    content = "\n".join(body)
    scripts = ""
    if PLOT in content:
        require("plotly", extra="compare")
        library = require("plotly.offline", extra="compare").get_plotlyjs()
        scripts = f"<script>{library}</script>\n<script>{SCRIPT}</script>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{content}\n</main>\n{scripts}\n</body>\n</html>\n"
    )


def paragraph(text: str, *, kind: str = "") -> str:
    """A paragraph; `kind` is empty, `note` or `answer`."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def links(targets: Mapping[str, str]) -> str:
    """A list of links, text to address."""
    lines = (
        f'<li><a href="{html.escape(address)}">{html.escape(text)}</a></li>'
        for text, address in targets.items()
    )
    return f"<ul>{''.join(lines)}</ul>"


def preformatted(text: str) -> str:
    """A command or a listing, wrapped where the screen is narrow."""
    return f"<pre>{html.escape(text)}</pre>"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, marked: Sequence[int] = ()
) -> str:
    """A table that scrolls on its own; columns of numbers go right, `marked` rows stand out."""
    texts = [["" if value is None else _plain(value) for value in row] for row in rows]
    kinds = [
        ' class="number"' if rows and all(_is_number(row[i]) for row in texts) else ""
        for i in range(len(columns))
    ]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{kind}>{html.escape(cell)}</{tag}>"
            for cell, kind in zip(cells, kinds, strict=True)
        )

    head = line("th", columns)
    lines = [
        f'<tr class="marked">{line("td", row)}</tr>'
        if i in marked
        else f"<tr>{line('td', row)}</tr>"
        for i, row in enumerate(texts)
    ]
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(variants: Mapping[str, Mapping[str, Any]], *, label: str = "Show") -> str:
    """A plot, or several under a selector: names to plotly figures `{"data": [...], "layout": {...}}`."""
    values = html.escape(json.dumps(list(variants.values()), allow_nan=False))
    choice = ""
    if len(variants) > 1:
        options = "".join(
            f'<option value="{i}">{html.escape(name)}</option>' for i, name in enumerate(variants)
        )
        choice = f'<label class="choice">{html.escape(label)} <select>{options}</select></label>'
    return f'<figure>{choice}{PLOT}{values}"></div></figure>'


def rows_of(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain values as rows of a name and a value."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += rows_of(value, f"{prefix}{name} ")
        elif value is not None:
            found.append((f"{prefix}{name}".replace("_", " "), _plain(value)))
    return found


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return all(word[:1].isdigit() or word in ("±", "-") for word in text.split())


def series_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, distinct also for the colour-blind (the palette of Okabe and Ito)."""
    palette = (
        "#0072b2",
        "#e69f00",
        "#009e73",
        "#cc79a7",
        "#d55e00",
        "#56b4e9",
        "#8c6bb1",
        "#999999",
    )
    return dict(zip(names, itertools.cycle(palette), strict=False))


STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --muted: #5c636b; --page: #fcfcfb; --line: #d9dbde;
  --mark: #e5f2ec; --panel: #f2f3f4; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e7e9; --muted: #a2a8af; --page: #16181b;
  --line: #383c42; --mark: #1d3a30; --panel: #212429; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
p, li { margin: 0.5rem 0; overflow-wrap: anywhere; }
a { color: inherit; }
.note { color: var(--muted); font-size: 0.9rem; }
.answer { background: var(--mark); padding: 0.75rem 1rem; border-radius: 0.4rem; font-size: 1.05rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.3rem 0.7rem 0.3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { min-width: 4rem; }
th { color: var(--muted); font-weight: 600; }
th.number, td.number { text-align: right; }
td.number { white-space: nowrap; }
tr.marked { background: var(--mark); font-weight: 600; }
pre { background: var(--panel); padding: 0.75rem; border-radius: 0.4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 0.82rem; }
figure { margin: 0.5rem 0; }
.choice { color: var(--muted); font-size: 0.9rem; }
select { font: inherit; color: var(--text); background: var(--panel); border: 1px solid var(--line);
  border-radius: 0.3rem; padding: 0.2rem 0.4rem; max-width: 100%; }
.plot { width: 100%; height: 26rem; }
"""

# Plots take their colours from the page, again when the reader switches between light and dark.
SCRIPT = """
(() => {
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = given => ({ gridcolor: colour("--line"), zerolinecolor: colour("--line"),
    linecolor: colour("--line"), automargin: true, ...given });
  const draw = plot => {
    const chosen = plot.parentElement.querySelector("select");
    const { data, layout } = JSON.parse(plot.dataset.variants)[chosen ? Number(chosen.value) : 0];
    return Plotly.react(plot, data, { autosize: true, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 48, r: 12, t: 12, b: 40 },
      legend: { orientation: "h", y: -0.22, yanchor: "top", x: 0 },
      hoverlabel: { align: "left" }, ...layout,
      font: { color: colour("--text"), size: 12 },
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis) },
      { responsive: true, displaylogo: false, displayModeBar: false });
  };
  const plots = [...document.querySelectorAll(".plot")];
  const drawAll = () => Promise.all(plots.map(draw));
  for (const plot of plots)
    plot.parentElement.querySelector("select")?.addEventListener("change", () => draw(plot));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll().then(() => { document.documentElement.dataset.drawn = String(plots.length); });
})();
"""
