"""The reference pages of the documentation, written from the same records as `seqmix explain`.

They are made while the documentation is built, so none of them can be out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from seqmix.cli import _describe

Record = dict[str, Any]


def pages(claims: Path) -> dict[str, str]:
    """Markdown by file name; `claims` is the folder of the kept results of `seqmix reproduce`."""
    return {
        "operators.md": "\n".join(_operators()),
        "mixers.md": "\n".join(_mixers()),
        "channels.md": "\n".join(_channels()),
        "tasks.md": "\n".join(_tasks()),
        "claims.md": "\n".join(_claims(claims)),
    }


def _operators() -> Iterator[str]:
    yield "# Operators\n"
    yield "One mathematical function each, in several forms that must agree with its definition.\n"
    names = _describe.catalog("operators").names()
    records = [_describe.describe_operator(name) for name in names]
    yield from _index(records)
    for record in records:
        yield f"\n## {record['name']}\n\n{record['description']}\n"
        yield f"```latex\n{record['equation']}\n```\n\nSource: {record['source']}\n"
        yield f"```text\n{record['documentation']}\n```\n"
        yield "Forms, in order of preference:\n"
        yield from _table(
            ["form", "trains", "what it does"],
            [
                [f"`{form}`", "yes" if about["trains"] else "no", about["description"]]
                for form, about in record["forms"].items()
            ],
        )
        yield "\nWhich form is chosen, and why others are not:\n"
        rows = []
        for case in record["cases"]:
            sizes = " ".join(f"{k}={v}" for k, v in {**case["sizes"], **case["options"]}.items())
            against = [f"{form}: {reason}" for form, reason in case["why_not"].items() if reason]
            rows.append([case["name"], f"`{sizes}`", f"`{case['chosen']}`", "; ".join(against)])
        yield from _table(["case", "sizes", "chosen", "cannot run"], rows)


def _mixers() -> Iterator[str]:
    yield "# Mixers\n"
    yield "Layers that mix tokens; figures are of the default configuration, one text, float32.\n"
    records = [_describe.describe_mixer(name) for name in _describe.catalog("mixers")]
    yield from _table(
        [
            "mixer",
            "operator",
            "complexity and state",
            *(f"state bytes @{n}" for n in _describe.CONTEXTS),
        ],
        [
            [
                f"[{r['name']}](#{r['name']})",
                f"`{r['operator']}`" if r["operator"] else "",
                r["complexity"],
                *(f"{size:,}" for size in r["state_bytes"].values()),
            ]
            for r in records
        ],
    )
    for record in records:
        yield from _part(record)
        flops = ", ".join(f"{n:,.0f} after {c}" for c, n in record["decode_flops"].items())
        yield f"\n{record['complexity']} {record['parameters']:,} parameters; FLOPs of a token: {flops}.\n"
        for law, reason in record["exceptions"].items():
            yield f"Does not keep the law `{law}`: {reason}\n"


def _channels() -> Iterator[str]:
    yield "# Channel mixers\n"
    yield "Layers that mix the channels of one token; figures are of the default configuration.\n"
    records = [_describe.describe_channel(name) for name in _describe.catalog("channels")]
    yield from _index(records)
    for record in records:
        yield from _part(record)
        yield f"\n{record['parameters']:,} parameters; {record['flops_per_token']:,.0f} FLOPs per token.\n"


def _tasks() -> Iterator[str]:
    yield "# Tasks\n"
    yield "Learning problems with exact answers, an oracle that scores 1, and a known chance level.\n"
    tasks = _describe.catalog("tasks")
    for name in tasks:
        yield f"\n## {name}\n\n```text\n{_describe.docstring(tasks, name)}\n```\n"
        config = getattr(tasks.get(name), "Config", None)
        if config is not None:
            yield from _config(_describe.describe_config(config))


def _claims(folder: Path) -> Iterator[str]:
    yield "# Claims\n"
    yield (
        "What papers claim, measured here by `seqmix reproduce ID`. A claim that does not hold here stays, "
        "with its evidence. Nothing on this page is typed: it shows the records of full runs.\n"
    )
    claims = _describe.catalog("claims")
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    rows = []
    for name in claims:
        identifier = name.replace("_", "-")
        result = results.get(identifier)
        verdict = result["verdict"] if result else "no full run is kept"
        rows.append([f"[{identifier}](#{identifier})", _describe.summary(claims, name), verdict])
    yield from _table(["claim", "", "verdict here"], rows)
    for name in claims:
        identifier = name.replace("_", "-")
        yield f"\n## {identifier}\n\n```text\n{_describe.docstring(claims, name)}\n```\n"
        if identifier in results:
            yield from _result(results[identifier])


def _result(result: Record) -> Iterator[str]:
    yield f"{result['title']} ({result['paper']}, {result['where']}). {result['claimed']}\n"
    yield from _table(
        ["statement", "expected", "measured", "verdict"],
        [
            [
                finding["statement"],
                finding["expected"],
                ", ".join(f"{key} {value}" for key, value in finding["measured"].items()),
                f"**{finding['verdict']}**",
            ]
            for finding in result["findings"]
        ],
    )
    machine = result["machine"]
    yield (
        f"\nSize {result['size']}, {result['seconds']:.0f} s on {machine['cpu']} with {machine['threads']} "
        f"threads, torch {machine['versions']['torch']}, {result['date']}, "
        f"commit {machine.get('commit') or 'unknown'}.\n"
    )


def _part(record: Record) -> Iterator[str]:
    yield f"\n## {record['name']}\n\n```text\n{record['documentation']}\n```\n"
    yield from _config(record["config"])


def _config(fields: Sequence[Record]) -> Iterator[str]:
    rows = [[f"`{f['field']}`", f"`{f['type']}`", f"`{f['default']!r}`"] for f in fields]
    yield from _table(["field", "type", "default"], rows)


def _index(records: Sequence[Record]) -> Iterator[str]:
    rows = [[f"[{r['name']}](#{r['name']})", r["description"]] for r in records]
    yield from _table(["", ""], rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    yield line(columns)
    yield line(["---"] * len(columns))
    yield from map(line, rows)
