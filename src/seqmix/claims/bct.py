"""BCT: blocks of weights and of activations rounded on their own, without retraining (Dong et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._rounding import fitted, loss, num_bytes, prepared

SMALLER = 7.988 * 0.95  # times: within 5% of the paper's figure
LOST = 0.05  # of the perplexity's logarithm: "a stated loss change" has no figure of the paper's for this task


def measure(run: Run) -> list[Finding]:
    found = run.remember("model", lambda: compared(run))
    return [size(found), against_layerwise(found), kept(found)]


def compared(run: Run) -> dict[str, Any]:
    """Bytes and held-out loss of the whole model, blockwise, and with one factor per tensor."""
    model, calibration, held_out = prepared(run)
    bits = run["input_bits"]
    blockwise, notes = fitted("blockwise", model, calibration, block=run["block"], input_bits=bits)
    found: dict[str, Any] = {
        "whole": {"bytes": num_bytes(model), "loss": loss(model, held_out)},
        "blockwise": {"bytes": num_bytes(blockwise), "loss": loss(blockwise, held_out)},
        "left dense": notes["left dense"],
    }
    del blockwise
    layerwise = rounded_by_layer(model, bits)
    found["layerwise"] = {"loss": loss(layerwise, held_out)}
    return found


@torch.no_grad()
def rounded_by_layer(model: Any, input_bits: int) -> Any:
    """A copy with one step for every weight and one for every input of a layer, those of the least squared error."""
    import copy

    from seqmix.compress._activations import linear_layers
    from seqmix.compress._quantizers import best_step, to_steps

    made = copy.deepcopy(model)

    def before(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return (to_steps(x, best_step(x, input_bits), input_bits), *inputs[1:])

    for _, layer in linear_layers(made.model):
        layer.register_forward_pre_hook(before)
    weights = {p.data_ptr(): p for p in made.parameters() if p.ndim == 2}
    for weight in weights.values():
        weight.copy_(to_steps(weight, best_step(weight, 4), 4))
    return made


def size(found: dict[str, Any]) -> Finding:
    ratio = found["whole"]["bytes"] / found["blockwise"]["bytes"]
    return Finding(
        "The whole model becomes 7.988 times smaller.",
        f"all tensors take at least {SMALLER:.3g} times fewer bytes than in float32, within 5% of the paper's figure",
        {"times smaller": ratio, "bytes": {n: found[n]["bytes"] for n in ("whole", "blockwise")}}
        | {"left dense": found["left dense"]},
        "reproduced" if ratio >= SMALLER else "not reproduced",
    )


def against_layerwise(found: dict[str, Any]) -> Finding:
    losses = {name: found[name]["loss"] for name in ("whole", "blockwise", "layerwise")}
    better = losses["blockwise"] < losses["layerwise"]
    return Finding(
        "Blocks keep more than layers at the same bits.",
        "a lower held-out loss than with one factor for every weight and every input of a layer, each with the least "
        "squared error, at the same bits",
        {"loss": losses},
        "reproduced" if better else "not reproduced",
    )


def kept(found: dict[str, Any]) -> Finding:
    change = found["blockwise"]["loss"] / found["whole"]["loss"] - 1
    return Finding(
        "Hardly any quality is lost without retraining.",
        f"a held-out loss at most {LOST:.0%} higher; the paper's accuracies fall by less than 0.9% on most tasks",
        {"relative change of the loss": change},
        "reproduced" if change <= LOST else "not reproduced",
    )


CLAIM = Claim(
    title="Blockwise Compression of Transformer-based Models without Retraining",
    paper="arXiv:2304.01483",
    claimed="Rounding blocks of weights, embeddings and intermediate results, each with a factor of its own, makes a "
    "Transformer up to 7.988 times smaller without retraining, with less than 0.9% of accuracy lost on most tasks.",
    where="abstract and section 4. A language model's loss here, not GLUE; the softmax inside attention is not rounded",
    measure=measure,
    quick={"model": "tiny", "length": 64, "block": 32, "input_bits": 8},
    full={
        "model": "smollm2-135m",
        "data": "shakespeare",
        "length": 128,
        "windows": 12,
        "block": 64,
        "input_bits": 8,
    },
)
