"""Noisy: the inputs of linear layers in few bits, with a fixed noisy bias before rounding that is removed after it.

    y = W Q(x + N) + (b - W N),   N uniform from -a to a, one draw per layer

Step and amplitude a are those with the least error of the layer's output on the calibration text, a = 0
(no noise) among them. Each block of the model sees what the rounded ones before it give.
Liu et al. 2022 (arXiv:2211.16056), section 3. The published code searches step and amplitude in the same way, and a
mean of the noise too, which is 0 here as in the paper's theorem.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from seqmix.compress._activations import first_inputs, linear_layers, through, watched
from seqmix.compress._quantizers import CLIPS, largest
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.linears import replace_layer
from seqmix.linears.noisy import Noisy
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.rebuild import replaced

AMPLITUDES = (0.0, 0.5, 1.0, 1.5, 2.0)  # in halves of a step
ROWS = 256  # of a layer's inputs, by which step and amplitude are chosen


@dataclass(frozen=True, kw_only=True)
class ToNoisy(Transform):
    grows: ClassVar = "every layer keeps its noise and a bias, and its weights stay as they are"

    bits: int = 6  # of the inputs
    noise: bool = True
    tokens: int = 2048  # of the calibration text
    seed: int = 0  # of the noise

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ConfigError(f"noisy: bits={self.bits}, wanted 2 to 16.")
        if self.tokens < 1:
            raise ConfigError(f"noisy: tokens={self.tokens}, wanted at least 1.")

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        made = copy.deepcopy(model).eval().model
        x = first_inputs(made, data.first(self.tokens).to(model.device))
        random = torch.Generator().manual_seed(self.seed)
        found: dict[str, Noisy] = {}
        amplitudes: dict[str, float] = {}
        for number, block in enumerate(work.track(made.backbone.blocks, "rounding inputs")):
            layers = dict(linear_layers(block))
            for name, rows in sampled_inputs(block, layers, x).items():
                place = f"backbone.blocks.{number}.{name}"
                draw = torch.rand(rows.shape[1], generator=random).to(rows) * 2 - 1
                tried = AMPLITUDES if self.noise else (0.0,)
                found[place], amplitudes[place] = best(layers[name], rows, draw, self.bits, tried)
                replace_layer(block, name, found[place])
            x = through(block, x)
        if not found:
            raise ConfigError("noisy: no dense linear layer is left. Leave out this step.")
        work.notes["amplitudes"] = amplitudes
        return replaced(model, found)

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        tries = len(CLIPS) + len(AMPLITUDES)
        activations = self.tokens * model.config.hidden_size * 4
        return Needs(
            forward_tokens=2 * self.tokens + tries * ROWS, memory_mb=4 * activations / 2**20
        )


def sampled_inputs(block: nn.Module, layers: dict[str, nn.Linear], x: Tensor) -> dict[str, Tensor]:
    """At most `ROWS` inputs of every layer while x passes the block, evenly spread, [rows, inputs]."""
    seen: dict[str, list[Tensor]] = {}
    with watched(layers, lambda name, u: seen.setdefault(name, []).append(u.flatten(0, -2))):
        through(block, x)  # type: ignore[arg-type]
    found = {}
    for name, parts in seen.items():
        rows = torch.cat(parts)
        if len(rows):
            chosen = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).round().long()
            found[name] = rows[chosen]
    return found


@torch.no_grad()
def best(
    layer: nn.Linear, rows: Tensor, draw: Tensor, bits: int, amplitudes: Iterable[float]
) -> tuple[Noisy, float]:
    """The step without noise, then the amplitude, of the least squared error of the outputs for `rows`."""
    wanted = layer(rows)
    peak = rows.abs().amax().clamp_min(1e-30)

    def error(made: Noisy) -> float:
        return float((made(rows) - wanted).square().sum())

    zeros = torch.zeros_like(draw)
    steps = [share * peak / largest(bits) for share in CLIPS]
    step = min(steps, key=lambda step: error(Noisy.of(layer, zeros, step, bits=bits)))
    tried = {a: Noisy.of(layer, a * step / 2 * draw, step, bits=bits) for a in amplitudes}
    chosen = min(tried, key=lambda a: error(tried[a]))
    return tried[chosen], chosen


TRANSFORM = ToNoisy
