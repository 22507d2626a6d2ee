"""LRQ-DiT: logarithmic levels for long-tailed weights, rotations for activations with outliers (Yang et al. 2025)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._diffusion import Judge, calibrate, trained
from seqmix.claims._rounding import fitted, loss, prepared

TAILS = {"normal": None, "Student's t, 8": 8.0, "Student's t, 4": 4.0}  # degrees of freedom
BITS = (3, 4)
INPUT_BITS = 4
CUTS = (1.0, 0.9, 0.8, 0.7, 0.6)  # shares of the range that even levels may take


def measure(run: Run) -> list[Finding]:
    drawn = run.remember("drawn weights", lambda: on_drawn_weights(run["rows"]))
    found = run.remember("model", lambda: on_model(run))
    diffused = run.remember("diffusion Transformer", lambda: on_diffusion(run))
    return [
        errors(drawn, found),
        losses(found),
        turned(found),
        noise(diffused),
        images(diffused),
    ]


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Imported late, for it brings transformers."""
    from seqmix.compress import _activations

    yield from _activations.linear_layers(module)


def uniform(weight: Tensor, bits: int, cuts: Sequence[float] = CUTS) -> Tensor:
    """Rounded to 2^bits even levels over each row's range, cut to that of these shares which has the least error."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    found, best = weight, torch.full_like(low, torch.inf)
    for share in cuts:
        step = share * (high - low).clamp_min(1e-30) / (2**bits - 1)
        tried = ((weight - share * low) / step).round().clamp(0, 2**bits - 1) * step + share * low
        error = (tried - weight).square().sum(1, keepdim=True)
        found = torch.where(error < best, tried, found)
        best = torch.minimum(error, best)
    return found


def logarithmic(weight: Tensor, bits: int) -> Tensor:
    from seqmix.compress._quantizers import twin_log
    from seqmix.linears.twin_log import TwinLog, of_codes

    codes, peaks, bases = twin_log(weight, bits)
    made = TwinLog(of_codes(codes), peaks, bases, weight.new_zeros(weight.shape[1]), bits=bits)
    return made.weight()


def ratio(weight: Tensor, bits: int, cuts: Sequence[float] = CUTS) -> float:
    """Squared error of logarithmic levels over that of uniform ones."""
    wrong, even = (
        float((rounded - weight).square().sum())
        for rounded in (logarithmic(weight, bits), uniform(weight, bits, cuts))
    )
    return wrong / max(even, 1e-30)


def on_drawn_weights(rows: int) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios of errors on random weights, by how long their tails are, over even levels with and without a cut."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = {
            name: torch.randn(rows, 576)
            if freedom is None
            else torch.distributions.StudentT(freedom).sample((rows, 576))
            for name, freedom in TAILS.items()
        }
    return {
        name: {
            tails: {str(b): ratio(weight, b, cuts) for b in BITS} for tails, weight in drawn.items()
        }
        for name, cuts in (("best cut", CUTS), ("whole range", (1.0,)))
    }


@torch.no_grad()
def on_model(run: Run) -> dict[str, Any]:
    """Ratios of errors on every eighth output of every layer, and held-out losses."""
    model, calibration, held_out = prepared(run)
    weights = [layer.weight.detach()[::8] for _, layer in linear_layers(model.model.backbone)]
    found: dict[str, Any] = {"whole": loss(model, held_out), "layers": {}, "loss": {}}
    for bits in BITS:
        ratios = sorted(ratio(weight, bits) for weight in weights)
        found["layers"][str(bits)] = {
            "with a lower error": sum(r < 1 for r in ratios) / len(ratios),
            "median ratio": ratios[len(ratios) // 2],
        }
        made, _ = fitted(
            "log_rotation", model, calibration, bits=bits, input_bits=None, rotated=False
        )
        found["loss"][str(bits)] = {
            "logarithmic": loss(made, held_out),
            "uniform": loss(uniform_weights(model, bits), held_out),
        }
    for name, rotated in (("rotated", True), ("not rotated", False)):
        options = {"bits": 4, "input_bits": INPUT_BITS, "rotated": rotated}
        made, notes = fitted("log_rotation", model, calibration, tokens=run["tokens"], **options)
        found[name] = loss(made, held_out)
        found["layers with salient outliers"] = len(notes["salient outliers in"])
    return found


def uniform_weights(model: Any, bits: int) -> Any:
    made = copy.deepcopy(model)
    for _, layer in linear_layers(made.model.backbone):
        layer.weight.copy_(uniform(layer.weight, bits))
    return made


def on_diffusion(run: Run) -> dict[str, Any]:
    """Errors of a diffusion Transformer trained here with the weights of its blocks rounded, inputs too or not."""
    model = trained(run)
    judge = Judge(model, run["samples"])
    found: dict[str, Any] = {"whole": judge.errors(model), "bits": {}}
    weights = [layer.weight.detach() for _, layer in linear_layers(model.blocks)]
    for bits in BITS:
        ratios = sorted(ratio(weight, bits) for weight in weights)
        row: dict[str, Any] = {"median ratio of the weights' errors": ratios[len(ratios) // 2]}
        for name, input_bits in (("weights", None), ("weights and inputs", INPUT_BITS)):
            row[name] = {
                "logarithmic": judge.errors(turned_model(model, bits, input_bits, run["samples"])),
                "uniform": judge.errors(even_model(model, bits, input_bits)),
                "uniform, whole range": judge.errors(even_model(model, bits, input_bits, (1.0,))),
            }
        found["bits"][str(bits)] = row
    return found


@torch.no_grad()
def turned_model(model: nn.Module, bits: int, input_bits: int | None, images: int) -> nn.Module:
    """With logarithmic weights, and rotations where inputs are rounded."""
    from seqmix.compress.log_rotation import LogRotation, channel_peaks
    from seqmix.linears import replace_layer

    made = copy.deepcopy(model)
    layers = {f"blocks.{place}": layer for place, layer in linear_layers(made.blocks)}
    step = LogRotation(bits=bits, input_bits=input_bits, rotated=input_bits is not None)
    for place, peaks in channel_peaks(layers, calibrate(made, images)).items():
        replace_layer(made, place, step.rounded(layers[place], peaks))
    return made


@torch.no_grad()
def even_model(
    model: nn.Module, bits: int, input_bits: int | None, cuts: Sequence[float] = CUTS
) -> nn.Module:
    """With even levels, inputs rounded token by token as in the other."""
    from seqmix.linears.int4 import rounded

    made = copy.deepcopy(model)
    for _, layer in linear_layers(made.blocks):
        layer.weight.copy_(uniform(layer.weight, bits, cuts))
        if input_bits is not None:
            layer.register_forward_pre_hook(
                lambda layer, inputs: rounded(inputs[0], input_bits, layer.in_features)
            )
    return made


def errors(drawn: dict[str, dict[str, dict[str, float]]], found: dict[str, Any]) -> Finding:
    tailed = [r for name, row in drawn["best cut"].items() if TAILS[name] for r in row.values()]
    real = [row["median ratio"] for row in found["layers"].values()]
    holds = all(r < 1 for r in tailed + real)
    return Finding(
        "Logarithmic levels round long-tailed weights with a smaller error than evenly spaced ones at 3 and 4 bits.",
        "a ratio of squared errors below 1 on weights drawn from Student's t, and in the median over the linear layers "
        "of a pretrained model, against 2^bits even levels per output with the best cut",
        {"drawn": drawn, "layers": found["layers"]},
        "reproduced" if holds else "not reproduced",
    )


def losses(found: dict[str, Any]) -> Finding:
    holds = all(row["logarithmic"] < row["uniform"] for row in found["loss"].values())
    return Finding(
        "A model keeps more with them at 3 and 4 bits.",
        "a lower held-out loss than with evenly spaced levels, weights alone rounded",
        {"whole": found["whole"], "loss by bits": found["loss"]},
        "reproduced" if holds else "not reproduced",
    )


def turned(found: dict[str, Any]) -> Finding:
    return Finding(
        "Rotations chosen by the outliers of each layer's inputs make activations of few bits better.",
        f"with weights and inputs in 4 and {INPUT_BITS} bits, a lower held-out loss than without rotation",
        {name: found[name] for name in ("rotated", "not rotated", "layers with salient outliers")},
        "reproduced" if found["rotated"] < found["not rotated"] else "not reproduced",
    )


def noise(found: dict[str, Any]) -> Finding:
    return Finding(
        "On a trained diffusion Transformer the error is below that of uniform quantisation at 3 and 4 bits.",
        "a lower relative squared error of the predicted noise on held-out images, with weights alone rounded and with "
        f"inputs in {INPUT_BITS} bits as well (there the logarithmic ones rotated)",
        found,
        "reproduced"
        if all(
            row[name]["logarithmic"]["noise"] < row[name]["uniform"]["noise"]
            for row in found["bits"].values()
            for name in ("weights", "weights and inputs")
        )
        else "not reproduced",
    )


def images(found: dict[str, Any]) -> Finding:
    rows = {bits: row["weights and inputs"] for bits, row in found["bits"].items()}
    measured = {
        bits: {name: {k: row[name][k] for k in ("samples", "Frechet distance")} for name in row}
        for bits, row in rows.items()
    }
    return Finding(
        "Its images stay nearer to those of the model in full precision.",
        f"a lower relative squared error of samples from the same noise at 3 and 4 bits, inputs in {INPUT_BITS}",
        {"Frechet distance in full precision": found["whole"]["Frechet distance"], **measured},
        "reproduced"
        if all(row["logarithmic"]["samples"] < row["uniform"]["samples"] for row in rows.values())
        else "not reproduced",
    )


CLAIM = Claim(
    title="LRQ-DiT: Log-Rotation Post-Training Quantization of Diffusion Transformers for Image and Video Generation",
    paper="arXiv:2508.03485",
    claimed="Weights of diffusion Transformers have long tails, where logarithmic levels err less than uniform ones; "
    "Hadamard or outlier-aware rotations, chosen per layer, tame their activations; images stay good at few bits.",
    where="abstract. The linear layers of a language model, and a small diffusion Transformer trained here on scanned "
    "digits; the rotation for salient outliers is our own",
    measure=measure,
    quick={
        "model": "tiny",
        "length": 64,
        "rows": 64,
        "tokens": 64,
        "transformer": {"width": 16, "depth": 1, "heads": 2, "patch": 4},
        "diffusion_steps": 4,
        "diffusion_rate": 1e-3,
        "diffusion_batch": 8,
        "samples": 4,
    },
    full={
        "model": "smollm2-135m",
        "data": "shakespeare",
        "length": 128,
        "windows": 8,
        "rows": 576,
        "tokens": 512,
        "transformer": {"width": 96, "depth": 3, "heads": 4, "patch": 2},
        "diffusion_steps": 2000,
        "diffusion_rate": 1e-3,
        "diffusion_batch": 48,
        "samples": 200,
    },
)
