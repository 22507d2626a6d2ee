"""Which implementation each layer of a Hugging Face model runs after `seqmix.accelerate`, and why."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from seqmix.convert._places import FORWARDS, FUNCTIONS, called_names, places
from seqmix.convert.accelerate import modelling_modules
from seqmix.core.errors import CheckpointError
from seqmix.kernels import ISA, missing
from seqmix.models.pretrained import auto_class
from seqmix.ops._operator import Operator

ONE_TOKEN = (
    "causal_conv1d_update",
    "mamba_selective_state_update",
)  # PyTorch's only form: the reference


def skeleton(name: str) -> nn.Module:
    """The model of a hub name, a folder or a configuration file, without weights.

    Raises `CheckpointError` when there is no such configuration, or none of a model that transformers has.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} has no configuration that transformers can read ({error}). Give a hub name, a folder with a "
            "config.json, or that file."
        ) from None
    with torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config)
    return model


def explain_model(model: nn.Module) -> list[dict[str, Any]]:
    """A row for every function that a layer calls and we know, and for every attention layer.

    Each says the layer, its class, the function, our operator, what runs on the CPU (a compiled kernel with its
    instruction set, a PyTorch form, or transformers' reference) and why. dtypes are those of the weights.
    """
    known = {
        (place.owner, place.name): place.operator
        for module in modelling_modules(model)
        for place in places(module)
        if place.operator
    }
    modules = {module.__name__: module for module in modelling_modules(model)}
    rows = []
    for name, layer in model.named_modules():
        kind = type(layer)
        module = modules.get(kind.__module__)
        dtype = next((p.dtype for p in layer.parameters()), torch.float32)
        row = {"layer": name, "class": kind.__name__}
        called: list[tuple[Any, str]] = [(kind, "forward")] if kind.__name__ in FORWARDS else []
        if module is not None:
            called += [(module, used) for used in called_names(kind) if used in FUNCTIONS]
        called = [place for place in called if place in known]
        for owner, used in called:
            runs, why = _implementation(known[owner, used], used, dtype)
            rows.append(
                {**row, "function": used, "operator": known[owner, used], "runs": runs, "why": why}
            )
        if not called and kind.__name__.endswith("Attention"):
            chosen = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
            why = "attention is left to transformers"
            rows.append(
                {**row, "function": "attention", "operator": "", "runs": chosen, "why": why}
            )
    return rows


def _implementation(operator: str, function: str, dtype: torch.dtype) -> tuple[str, str]:
    tensor = torch.empty(0, dtype=dtype)
    reason = missing(tensor)
    if function == "mamba2_selective_state_update":
        return "PyTorch", "one number a head, and the state in place"
    if reason is None:
        return (
            f"native {ISA}",
            f"the compiled kernels take {str(dtype).removeprefix('torch.')} on the CPU",
        )
    if function in ONE_TOKEN:
        return "transformers' reference", reason
    entry: Operator = importlib.import_module(f"seqmix.ops.{operator}").OPERATOR
    wanted = "recurrent" if "recurrent" in function else "chunked"
    return wanted if wanted in entry.forms else next(reversed(list(entry.forms))), reason
