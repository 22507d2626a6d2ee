"""Explain one operator, mixer, channel mixer, layout or Hugging Face model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from seqmix.cli import _describe
from seqmix.cli._terminal import Json, print_json, print_table, print_text
from seqmix.core.errors import ConfigError, UnknownName


def run(
    name: Annotated[
        str,
        typer.Argument(
            help="An operator, a mixer, a channel mixer, a layout or a Hugging Face model.",
            show_default=False,
        ),
    ],
    width: Annotated[int, typer.Option(help="Width of a layout's model.")] = 128,
    heads: Annotated[int, typer.Option(help="Heads of a layout's mixers.")] = 4,
    depth: Annotated[int | None, typer.Option(help="Blocks; the layout repeats up to it.")] = None,
    vocabulary: Annotated[int, typer.Option(help="Vocabulary of a layout's model.")] = 258,
    json: Json = False,
) -> None:
    """Explain an operator, a mixer, a channel mixer, a layout or a Hugging Face model.

    Of an operator: its forms, which of them can run on each case and why the others cannot, and which is
    chosen. Of a mixer: configuration, parameters, state and cost. Of a layout: blocks, parameters and cost.
    Of a Hugging Face model (a hub name with a slash, a folder or its config.json; no weights are read): the
    functions that each layer calls, what computes them after `seqmix.accelerate`, and the layout that it has in
    blocks of seqmix. A name that several of them have is explained as each.

    Example: `seqmix explain "3x[gated_linear_attention], attention"`
    """
    spec = {"width": width, "heads": heads, "depth": depth, "vocabulary": vocabulary}
    records = _records(name, spec)
    if json:
        print_json(records)
        return
    for kind, record in records.items():
        PRINTERS[kind](record)


def _records(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    if _is_model(name):
        from seqmix.convert.explain import explain_model, skeleton
        from seqmix.convert.hub import specification

        model = skeleton(_find(name))
        about = {"model": name, "class": type(model).__name__, "layers": explain_model(model)}
        try:
            fields = specification(model).to_dict()
        except ConfigError as error:
            return {"model": about | {"not imported": str(error)}}
        return {"model": about, "layout": _describe.describe_layout(**fields)}
    if not re.fullmatch(r"[\w-]+", name):
        return {"layout": _describe.describe_layout(name, **spec)}
    describers = {
        "operator": ("operators", _describe.describe_operator),
        "mixer": ("mixers", _describe.describe_mixer),
        "channel": ("channels", _describe.describe_channel),
    }
    records = {
        kind: describe(name)
        for kind, (plural, describe) in describers.items()
        if name in _describe.catalog(plural)
    }
    if not records:
        known = {n for plural, _ in describers.values() for n in _describe.catalog(plural)}
        raise UnknownName("operator, mixer or channel mixer", name, known)
    return records


def _is_model(name: str) -> bool:
    """A folder with a configuration, such a file, an asset, or a hub name: two words with a slash, no mixer first."""
    path = Path(name)
    if (path / "config.json").is_file() or (path.suffix == ".json" and path.is_file()):
        return True
    from seqmix.models.pretrained import ASSETS

    words = re.fullmatch(r"([\w.-]+)/[\w.-]+", name)
    return name in ASSETS or (words is not None and words[1] not in _describe.catalog("mixers"))


def _find(name: str) -> str:
    from seqmix.models.pretrained import ASSETS, find

    return find(name) if name in ASSETS else name


def _print_model(record: dict[str, Any]) -> None:
    print_text(
        f"MODEL {record['model']} ({record['class']}), after seqmix.accelerate, on the CPU\n"
    )
    columns = ["layer", "function", "operator", "runs", "why"]
    print_table(columns, [[row[column] for column in columns] for row in record["layers"]])
    if not any(row["operator"] for row in record["layers"]):
        print_text("No layer calls a function that seqmix computes: accelerate changes nothing.")
    if "not imported" in record:
        print_text(f"\nto_seqmix would refuse it. {record['not imported']}")
    else:
        print_text("\nIn blocks of seqmix (to_seqmix):")


def _print_operator(record: dict[str, Any]) -> None:
    print_text(f"OPERATOR {record['name']}\n")
    print_text(
        f"{record['documentation']}\n\nEquation: {record['equation']}\nSource: {record['source']}\n"
    )
    rows = [
        [form, "yes" if about["trains"] else "no", about["description"]]
        for form, about in record["forms"].items()
    ]
    print_table(["form", "trains", ""], rows, title="Forms, in order of preference")
    rows = []
    for case in record["cases"]:
        rows.append([case["name"], "", _sizes(case)])
        for form, reason in case["why_not"].items():
            rows.append(["", form, "chosen" if case["chosen"] == form else reason or "can run"])
    print_table(["case", "form", ""], rows, title="\nWhat can run, and what is chosen, by case")
    print_text("")


def _print_mixer(record: dict[str, Any]) -> None:
    print_text(f"MIXER {record['name']}\n")
    print_text(f"{record['documentation']}\n\n{record['complexity']}\n")
    _print_config(record)
    rows = [
        [int(length), record["state_bytes"][length], record["decode_flops"][length]]
        for length in record["state_bytes"]
    ]
    print_text(f"\n{record['parameters']:,} parameters; operator: {record['operator'] or 'none'}")
    print_table(["context", "state bytes", "FLOPs of the next token"], rows)
    for law, reason in record["exceptions"].items():
        print_text(f"Does not keep the law {law}: {reason}")
    print_text("")


def _print_channel(record: dict[str, Any]) -> None:
    print_text(f"CHANNEL MIXER {record['name']}\n\n{record['documentation']}\n")
    _print_config(record)
    print_text(
        f"\n{record['parameters']:,} parameters; {record['flops_per_token']:,.0f} FLOPs per token\n"
    )


def _print_config(record: dict[str, Any]) -> None:
    rows = [[field["field"], field["type"], str(field["default"])] for field in record["config"]]
    print_table(
        ["field", "type", "default"], rows, title="Configuration (used below: the defaults)"
    )


def _print_layout(record: dict[str, Any]) -> None:
    print_text(f"LAYOUT {record['layout']}\n")
    rows = [[block["block"], block["entry"], block["parameters"]] for block in record["blocks"]]
    print_table(["block", "mixer/channel mixer", "parameters"], rows)
    print_text(f"\n{record['parameters']:,} parameters in all. Predicted, for one text in float32:")
    columns = ["context", "prefill_flops", "decode_flops", "decode_bytes", "state_bytes"]
    rows = [[row[column] for column in columns] for row in record["contexts"]]
    print_table([column.replace("_", " ") for column in columns], rows)


def _sizes(case: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in {**case["sizes"], **case["options"]}.items())


PRINTERS = {
    "operator": _print_operator,
    "mixer": _print_mixer,
    "channel": _print_channel,
    "layout": _print_layout,
    "model": _print_model,
}
