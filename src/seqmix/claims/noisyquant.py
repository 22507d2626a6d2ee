"""NoisyQuant: a fixed noisy bias before rounding lowers the error (Liu et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._rounding import fitted, loss, prepared

THEORY = 0.02  # of the largest error that rounding can make: the margin around the sign change, and of the means
SHARE = 0.5  # of the layers, that gain


def measure(run: Run) -> list[Finding]:
    theory = run.remember("one value", lambda: one_value(run["draws"]))
    found = run.remember("model", lambda: six_bits(run))
    return [condition(theory), outputs(found), quality(found)]


def one_value(draws: int) -> list[dict[str, float]]:
    """Mean squared errors over draws of noise, at places between the middle of a step and its edge."""
    from seqmix.compress._quantizers import noisy_error

    random = torch.Generator().manual_seed(0)
    noise = torch.rand(draws, generator=random).double() * 2 - 1
    rows = []
    for amplitude in (0.5, 0.75, 1.0):  # of a step: n from b to 2b in the paper, whose step is 2b
        for x in torch.linspace(0, 0.5, 11).double():
            u = x + amplitude * noise
            rows.append(
                {
                    "amplitude": amplitude,
                    "place": float(x),
                    "without noise": float((x - x.round()).square()),
                    "predicted": float(noisy_error(x, amplitude)),
                    "measured": float((u.round() - u).square().mean()),
                }
            )
    return rows


def six_bits(run: Run) -> dict[str, Any]:
    """Losses on held-out text with inputs of linear layers in so many bits, with noise and without."""
    model, calibration, held_out = prepared(run)
    options = {"bits": run["bits"], "tokens": run["tokens"]}
    found: dict[str, Any] = {"whole": loss(model, held_out)}
    plain, _ = fitted("noisy", model, calibration, noise=False, **options)
    found["plain"] = loss(plain, held_out)
    found["noisy"] = {}
    for seed in run["seeds"]:
        noisy, notes = fitted("noisy", model, calibration, seed=seed, **options)
        found["noisy"][str(seed)] = loss(noisy, held_out)
        chosen = list(notes["amplitudes"].values())
        found["layers with noise"] = sum(a > 0 for a in chosen) / len(chosen)
        found["output error"] = output_errors(model, held_out[:1], plain, noisy)
    return found


@torch.no_grad()
def output_errors(model: Any, windows: torch.Tensor, plain: Any, noisy: Any) -> dict[str, float]:
    """On held-out inputs of the model's layers: in how many of them noise lowers the output's error, and how far."""
    from seqmix.compress._activations import watched
    from seqmix.linears.noisy import Noisy

    places = [p for p, m in noisy.model.named_modules() if isinstance(m, Noisy)]
    layers = {p: model.model.get_submodule(p) for p in places}
    ratios = []

    def see(place: str, x: torch.Tensor) -> None:
        layer = layers[place]
        wanted = torch.nn.functional.linear(x, layer.weight, layer.bias)
        errors = [
            float((made.model.get_submodule(place)(x) - wanted).square().sum())
            for made in (plain, noisy)
        ]
        ratios.append(errors[1] / max(errors[0], 1e-30))

    with watched(layers, see):
        model(input_ids=windows, use_cache=False)
    ordered = sorted(ratios)
    return {
        "layers with a lower error": sum(r < 1 for r in ratios) / len(ratios),
        "median ratio": ordered[len(ordered) // 2],
    }


def condition(rows: list[dict[str, float]]) -> Finding:
    clear = [row for row in rows if abs(row["predicted"] - row["without noise"]) > THEORY * 0.25]
    agree = all(
        (row["measured"] < row["without noise"]) == (row["predicted"] < row["without noise"])
        for row in clear
    ) and all(abs(row["measured"] - row["predicted"]) < THEORY * 0.25 for row in rows)
    return Finding(
        "For a value far enough from the middle of a step, and for no other, noise lowers the mean squared error.",
        "the sign of the change as the closed form says wherever it changes the error by more than 2% of its largest, "
        "0.25, and means within 2% of that",
        {"places": rows},
        "reproduced" if agree and clear else "not reproduced",
    )


def outputs(found: dict[str, Any]) -> Finding:
    errors = found["output error"]
    holds = errors["layers with a lower error"] > SHARE and errors["median ratio"] < 1
    return Finding(
        "Noise lowers the error of what linear layers give.",
        "a lower squared error on held-out text in more than half of the layers, and in the median",
        errors | {"layers with noise": found["layers with noise"]},
        "reproduced" if holds else "not reproduced",
    )


def quality(found: dict[str, Any]) -> Finding:
    better = all(value < found["plain"] for value in found["noisy"].values())
    return Finding(
        "With activations of six bits, noise improves the quality of the model.",
        "a lower held-out loss than with the same quantiser without noise, for every draw of the noise",
        {"loss": {name: found[name] for name in ("whole", "plain", "noisy")}},
        "reproduced" if better else "not reproduced",
    )


CLAIM = Claim(
    title="NoisyQuant: Noisy Bias-Enhanced Post-Training Activation Quantization for Vision Transformers",
    paper="arXiv:2211.16056",
    claimed="A fixed uniform noisy bias, added before activations are rounded and removed after, lowers the rounding "
    "error under a condition that can be proved, and makes linear quantisers of six bits better.",
    where="section 3 (theorem 1 and its use), section 4 (six bits). A language model here, not a vision Transformer",
    measure=measure,
    quick={
        "model": "tiny",
        "length": 64,
        "draws": 20_000,
        "tokens": 128,
        "bits": 6,
        "seeds": [0],
    },
    full={
        "model": "smollm2-135m",
        "data": "shakespeare",
        "length": 128,
        "windows": 8,
        "draws": 100_000,
        "tokens": 512,
        "bits": 6,
        "seeds": [0, 1],
    },
)
