"""The reference pages of the documentation, written from the same records as `seqmix explain`.

They are made while the documentation is built, so none of them can be out of date.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqmix.cli import _describe
from seqmix.report.bench import FLOOR_COLUMNS, SERVING_COLUMNS, floor_cells, serving_cells

Record = dict[str, Any]


def pages(docs: Path) -> dict[str, str]:
    """Every page, as Markdown by file name; `docs` is that of `write_page`."""
    return {name: write_page(name, docs) for name in NAMES}


def write_page(name: str, docs: Path) -> str:
    """One of the pages `NAMES`, as Markdown. `docs` holds the kept results.

    They are `claims/ID.json` of `seqmix reproduce`, `speed.json` of `seqmix bench --floors`, `serving/NAME.json`, the
    serving.json of `seqmix bench --server`, and `compression/NAME.json`, the result.json of `seqmix compress` or
    `convert`.
    """
    return "\n".join(_WRITERS[name](docs))


def _operators(docs: Path) -> Iterator[str]:
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


def _mixers(docs: Path) -> Iterator[str]:
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


def _channels(docs: Path) -> Iterator[str]:
    yield "# Channel mixers\n"
    yield "Layers that mix the channels of one token; figures are of the default configuration.\n"
    records = [_describe.describe_channel(name) for name in _describe.catalog("channels")]
    yield from _index(records)
    for record in records:
        yield from _part(record)
        yield f"\n{record['parameters']:,} parameters; {record['flops_per_token']:,.0f} FLOPs per token.\n"


def _tasks(docs: Path) -> Iterator[str]:
    yield "# Tasks\n"
    yield "Learning problems with exact answers, an oracle that scores 1, and a known chance level.\n"
    tasks = _describe.catalog("tasks")
    for name in tasks:
        yield f"\n## {name}\n\n```text\n{_describe.docstring(tasks, name)}\n```\n"
        config = getattr(tasks.get(name), "Config", None)
        if config is not None:
            yield from _config(_describe.describe_config(config))


def _objectives(docs: Path) -> Iterator[str]:
    yield "# Objectives\n"
    yield "What a model is trained to do with a text; `seqmix.train.objective` trains any model by them.\n"
    objectives = _describe.catalog("objectives")
    for name in objectives:
        yield f"\n## {name}\n\n```text\n{_describe.docstring(objectives, name)}\n```\n"
        yield from _config(_describe.describe_config(objectives.get(name).Config))


def _transforms(docs: Path) -> Iterator[str]:
    yield "# Transforms\n"
    yield (
        "Ways to make a pretrained model cheaper, the steps of a recipe of `seqmix compress` such as "
        "`finercut:0.25 | int8`. `NAME:VALUE` sets the first field, `NAME(field=value)` any.\n"
    )
    transforms = _describe.catalog("transforms")
    for name in transforms:
        yield f"\n## {name}\n\n```text\n{_describe.docstring(transforms, name)}\n```\n"
        yield from _config(_describe.describe_config(transforms.get(name)))


def _claims(docs: Path) -> Iterator[str]:
    yield "# Claims\n"
    yield (
        "What papers claim, measured here by `seqmix reproduce ID`. A claim that does not hold here stays, "
        "with its evidence. Nothing on this page is typed: it shows the records of full runs.\n"
    )
    claims = _describe.catalog("claims")
    results = {
        path.stem: json.loads(path.read_text()) for path in sorted((docs / "claims").glob("*.json"))
    }
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


def _speed(docs: Path) -> Iterator[str]:
    yield "# Speed\n"
    yield (
        "The speeds that the compiled kernels should reach on a CPU, and what `seqmix bench --floors` measured. "
        "Ratios are of medians within one run, both sides in turn; the size with the lowest ratio decides. "
        "Nothing on this page is typed: it shows the record of a run.\n"
    )
    path = docs / "speed.json"
    if not path.exists():
        yield "No run is kept.\n"
        yield from _serving(docs)
        return
    record = json.loads(path.read_text())
    rows = [floor_cells(floor) for floor in record["floors"]]
    yield from _table(FLOOR_COLUMNS, rows)
    roofs, machine = record["roofs"], record["machine"]
    yield (
        "\nWhat limits it: the share of our time that the counted arithmetic takes at the speed of a 2048-cube "
        f"float32 matrix product ({roofs['flops_per_second'] / 1e9:.3g} GFLOP/s in this run), the bytes of inputs "
        f"and outputs at the speed of memory ({roofs['bytes_per_second'] / 1e9:.3g} GB/s), and the exponentials at "
        f"that of torch ({roofs['exponentials_per_second'] / 1e9:.3g} per ns). What no share explains is neither: "
        "data moved within the caches, small operations, and the calls themselves.\n"
    )
    yield (
        f"{machine['cpu']} with {machine['threads']} threads, kernels for {machine['instruction_set']}, torch "
        f"{machine['versions']['torch']}, {record['date']}, commit {machine.get('commit') or 'unknown'}.\n"
    )
    yield "\nEvery size:\n"
    yield from _table(
        ["what", "against", "sizes", "ratio", "ours, ms", "the other, ms"],
        [_size(row) for row in record["rows"] if "skipped" not in row],
    )
    yield from _serving(docs)


def _serving(docs: Path) -> Iterator[str]:
    for path in sorted((docs / "serving").glob("*.json")):
        record = json.loads(path.read_text())
        machine = record["machine"]
        yield f"\n## Servers: {path.stem.replace('-', ' ')}\n"
        yield (
            "What clients of servers measured (`seqmix bench --server`), streams of different passages at once; "
            f"medians of {record['rounds']} rounds in which the servers took turns. {machine['cpu']}, "
            f"{machine['cores']} cores, {record['date']}, commit {machine.get('commit') or 'unknown'}.\n"
        )
        yield from _table(SERVING_COLUMNS, [serving_cells(row) for row in record["rows"]])


def _size(row: Record) -> list[str]:
    sizes = " ".join(f"{name}={size}" for name, size in row.get("sizes", {}).items())
    times = row.get("times", {})
    ours = [_spread(times["ours"])] if "ours" in times else [""]
    others = [_spread(time) for name, time in times.items() if name != "ours"] or [""]
    return [row["what"], row["against"], f"`{sizes}`", f"{row['ratio']:.3g}", *ours, *others[:1]]


def _spread(time: Record) -> str:
    return f"{time['median_ms']:.4g} ({time['low_ms']:.4g} to {time['high_ms']:.4g})"


def _part(record: Record) -> Iterator[str]:
    yield f"\n## {record['name']}\n\n```text\n{record['documentation']}\n```\n"
    yield from _config(record["config"])


def _config(fields: Sequence[Record]) -> Iterator[str]:
    rows = [[f"`{f['field']}`", f"`{f['type']}`", f"`{f['default']!r}`"] for f in fields]
    yield from _table(["field", "type", "default"], rows)


def _index(records: Sequence[Record]) -> Iterator[str]:
    rows = [[f"[{r['name']}](#{r['name']})", r["description"]] for r in records]
    yield from _table(["", ""], rows)


FIGURES = ("size_mb", "flops", "prefill_ms", "decode_ms", "loss", "zero_shot", "passkey")


def _compression(docs: Path) -> Iterator[str]:
    yield "# Models made cheaper\n"
    yield (
        "What `seqmix compress` and `seqmix convert` gave, each by one command (`make compression` runs them). Quality "
        "is measured on held-out text; times are medians of calls in turn within one run. Nothing here is typed.\n"
    )
    for path in sorted((docs / "compression").glob("*.json")):
        record = json.loads(path.read_text())
        arguments, machine = record["arguments"], record["machine"]
        yield f"\n## {path.stem}\n\n{arguments['model']}, {arguments['data']}: `{record['recipe']}`\n"
        known = [name for name in FIGURES if name in record["steps"][0]["figures"]]
        rows = []
        for step in record["steps"]:
            shares, figures = step["relative"], step["figures"]
            cells = [
                f"{figures[name]:.4g}" + (f" ({shares[name]:.3f}x)" if name in shares else "")
                for name in known
            ]
            rows.append([step["recipe"].rpartition("|")[2].strip() or "original", *cells])
        yield from _table(["after", *(name.replace("_", " ") for name in known)], rows)
        if found := record["frontier"]:
            metrics = found["metrics"]
            yield f"\nSearched for `{arguments['budget']}` in {arguments['trials']} trials:\n"
            worked = [trial for trial in found["trials"] if not trial["failed"]]
            yield from _table(
                ["recipe", *metrics, "frontier"],
                [
                    [
                        f"`{trial['recipe']}`",
                        *(f"{trial['relative'][m]:.3f}x" for m in metrics),
                        "yes" if trial["recipe"] in found["frontier"] else "",
                    ]
                    for trial in sorted(worked, key=lambda trial: trial["relative"][metrics[0]])
                ],
            )
            yield "\nEach method alone, and a combination on the frontier that is no worse in any metric:\n"
            yield from _table(
                ["method alone", "beaten by"],
                [
                    [
                        f"`{row['recipe']}`",
                        f"`{row['dominated by']}`" if row["dominated by"] else "none",
                    ]
                    for row in found["methods"]
                ],
            )
        yield (
            f"\n{machine['cpu']}, {machine['threads']} threads, kernels for {machine['instruction_set']}, commit "
            f"{machine['commit']}.\n"
        )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    yield line(columns)
    yield line(["---"] * len(columns))
    yield from map(line, rows)


_WRITERS: Mapping[str, Callable[[Path], Iterator[str]]] = {
    "operators.md": _operators,
    "mixers.md": _mixers,
    "channels.md": _channels,
    "tasks.md": _tasks,
    "objectives.md": _objectives,
    "transforms.md": _transforms,
    "claims.md": _claims,
    "speed.md": _speed,
    "compression.md": _compression,
}
NAMES = tuple(_WRITERS)
