"""What there is, as plain records: `seqmix list`, `seqmix explain` and the documentation all read these."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import warnings
from pathlib import Path
from typing import Any

from seqmix.core.catalog import Catalog
from seqmix.core.errors import NoUsableForm, UnknownName

KINDS = {  # kind -> where its catalog is
    "mixers": ("seqmix.mixers", "MIXERS"),
    "channels": ("seqmix.channels", "CHANNELS"),
    "operators": ("seqmix.ops", "OPERATORS"),
    "tasks": ("seqmix.tasks", "TASKS"),
    "objectives": ("seqmix.objectives", "OBJECTIVES"),
    "transforms": ("seqmix.compress", "TRANSFORMS"),
    "claims": ("seqmix.claims", "CLAIMS"),
    "corpora": ("seqmix.data.text", "CORPORA"),
}
CONTEXTS = (1024, 8192)  # lengths at which states and costs are given

Record = dict[str, Any]


def catalog(kind: str) -> Catalog:
    """The catalog of a kind; raises `UnknownName` with the kinds there are."""
    if kind not in KINDS:
        raise UnknownName("kind", kind, KINDS)
    module, name = KINDS[kind]
    found: Catalog = getattr(importlib.import_module(module), name)
    return found


def docstring(entries: Catalog, name: str) -> str:
    """The docstring of an entry's file, read without importing it."""
    spec = importlib.util.find_spec(f"{entries.package}.{name}")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return ast.get_docstring(tree) or ""


def summary(entries: Catalog, name: str) -> str:
    """The first line of an entry's docstring: its one-line description."""
    return docstring(entries, name).partition("\n")[0]


def list_entries(kind: str) -> list[Record]:
    """Name and description of every entry of a kind."""
    entries = catalog(kind)
    return [{"name": name, "description": summary(entries, name)} for name in entries]


def describe_operator(name: str) -> Record:
    """Equation, source, cases, and for each case which forms can run, why others cannot, and the choice."""
    from seqmix.testing._axes import with_length

    operators = catalog("operators")
    operator = operators.get(name)
    first = operator.cases[0]
    return {
        "name": operator.name,
        "description": summary(operators, operator.name),
        "equation": operator.equation,
        "source": operator.source,
        "signature": _signature(operator.function),
        "forms": {
            form: {"description": summarise(found.run), "trains": found.trains}
            for form, found in operator.forms.items()
        },
        "cases": [
            {"name": case.name, "sizes": dict(case.sizes), "options": dict(case.options)}
            | try_forms(operator, case)
            for case in [*operator.cases, with_length(first, 1).at(f"{first.name}, one token")]
        ],
        "timing": [
            {
                "name": case.name,
                "sizes": dict(case.sizes),
                "options": dict(case.options),
                **dataclasses.asdict(operator.cost(case)),
            }
            for case in operator.timing
        ],
        "documentation": inspect.getdoc(operator.function) or "",
    }


def try_forms(operator: Any, case: Any) -> Record:
    """Runs the operator on the case in each form: None or why it cannot, and what is chosen by itself."""
    import torch

    from seqmix.ops import record_forms

    inputs = operator.sample(case, torch.Generator().manual_seed(0))
    reasons: dict[str, str | None] = {}
    with torch.no_grad():
        for form in operator.forms:
            try:
                operator.function(**inputs, form=form)
                reasons[form] = None
            except NoUsableForm as error:
                reasons[form] = error.rejected.get(form, str(error))
        with record_forms() as ran, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the answer itself says that it is slow
            operator.function(**inputs)
    chosen = [form for name, form in sorted(ran) if name == operator.name]
    return {"why_not": reasons, "chosen": ", ".join(chosen)}


def describe_mixer(name: str) -> Record:
    """Docstring, configuration, and of the default configuration the parameters, state bytes and cost."""
    mixers = catalog("mixers")
    mixer_class = mixers.get(name)
    mixer = mixer_class(mixer_class.Config())
    return {
        "name": name.replace("-", "_"),
        "description": summary(mixers, name.replace("-", "_")),
        "documentation": docstring(mixers, name.replace("-", "_")),
        "complexity": summarise(mixer_class),
        "operator": mixer_class.operator,
        "causal": mixer_class.causal,
        "config": describe_config(mixer_class.Config),
        "parameters": count(mixer),
        "state_bytes": {str(length): mixer.state_bytes(length) for length in CONTEXTS},
        "decode_flops": {str(length): mixer.cost(1, context=length).flops for length in CONTEXTS},
        "exceptions": dict(mixer_class.exceptions),
    }


def describe_channel(name: str) -> Record:
    """Docstring, configuration and, of the default configuration, parameters and FLOPs per token."""
    channels = catalog("channels")
    channel_class = channels.get(name)
    channel = channel_class(channel_class.Config())
    return {
        "name": name.replace("-", "_"),
        "description": summary(channels, name.replace("-", "_")),
        "documentation": docstring(channels, name.replace("-", "_")),
        "config": describe_config(channel_class.Config),
        "parameters": count(channel),
        "flops_per_token": channel.cost(1).flops,
    }


def describe_layout(layout: str, **fields: Any) -> Record:
    """The blocks of a language model, its parameters, and its predicted cost and state by context."""
    import torch

    from seqmix.models.backbone import LanguageModel, ModelSpec

    spec = ModelSpec.from_dict({"layout": layout, **fields})
    with torch.device("meta"):
        model = LanguageModel(spec)
    return {
        "layout": layout,
        "spec": spec.to_dict(),
        "blocks": [
            {"block": i, "entry": str(entry), "parameters": count(block)}
            for i, (entry, block) in enumerate(
                zip(spec.entries(), model.backbone.blocks, strict=True)
            )
        ],
        "parameters": model.num_parameters(),
        "contexts": [
            {
                "context": length,
                "prefill_flops": model.cost(length).flops,
                "decode_flops": model.cost(1, context=length).flops,
                "decode_bytes": model.cost(1, context=length).bytes,
                "state_bytes": model.backbone.state_bytes(length),
            }
            for length in CONTEXTS
        ],
    }


def describe_config(config: type) -> list[Record]:
    """Name, type and default of every field."""
    return [
        {"field": field.name, "type": str(field.type), "default": field.default}
        for field in dataclasses.fields(config)
    ]


def count(module: Any) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def summarise(thing: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _signature(function: Any) -> str:
    return f"{function.__name__}{inspect.signature(function)}"
