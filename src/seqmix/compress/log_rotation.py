"""Log rotation: weights of logarithmic levels, and inputs turned so that few bits hold them.

Weights are dense in the middle with long tails; levels peak base^-k lie dense where they do, with a peak for each sign
and a base for every output (`seqmix.compress._quantizers.twin_log`). Inputs with a few large channels waste the levels
of the others. How uneven a layer's channels are decides about its rotation:

    peak_i = max |x_i| over the calibration text;   unevenness = max_i peak_i / median_i peak_i
    above `salient`     a reflection before the Hadamard matrices, so that both spread the peaks evenly over all inputs
    else                Hadamard matrices alone

Each block of the model sees what the rounded ones before it give.
Yang et al. 2025 (LRQ-DiT, arXiv:2508.03485): twin-log quantisation and the adaptive choice of rotation. The
outlier-aware rotation is a reflection of our own, for theirs is described by its aim alone in the abstract.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from seqmix.compress._activations import first_inputs, linear_layers, through, watched
from seqmix.compress._quantizers import twin_log
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.linears import replace_layer
from seqmix.linears.twin_log import TwinLog, of_codes, rotation
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.rebuild import replaced


@dataclass(frozen=True, kw_only=True)
class LogRotation(Transform):
    bits: int = 4  # of the weights: 2 to 4
    input_bits: int | None = 8  # of what goes into the layers; None leaves it
    rotated: bool = True
    salient: float = (
        20.0  # how many times the median channel the largest is, for outliers to be salient
    )
    tokens: int = 1024  # of the calibration text

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4:
            raise ConfigError(f"log_rotation: bits={self.bits}, wanted 2 to 4.")
        if self.input_bits is not None and not 2 <= self.input_bits <= 16:
            raise ConfigError(f"log_rotation: input_bits={self.input_bits}, wanted 2 to 16.")
        if self.tokens < 1:
            raise ConfigError(f"log_rotation: tokens={self.tokens}, wanted at least 1.")

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        made = copy.deepcopy(model).eval().model
        x = first_inputs(made, data.first(self.tokens).to(model.device))
        found: dict[str, TwinLog] = {}
        unevenness: dict[str, float] = {}
        for number, block in enumerate(work.track(made.backbone.blocks, "rounding")):
            layers = dict(linear_layers(block))
            for name, peaks in channel_peaks(layers, partial(through, block, x)).items():
                place = f"backbone.blocks.{number}.{name}"
                unevenness[place] = uneven(peaks)
                found[place] = self.rounded(layers[name], peaks)
                replace_layer(block, name, found[place])
            x = through(block, x)
        if not found:
            raise ConfigError("log_rotation: no dense linear layer is left. Leave out this step.")
        work.notes["salient outliers in"] = [p for p, u in unevenness.items() if u > self.salient]
        return replaced(model, found)

    def rounded(self, layer: nn.Linear, peaks: Tensor) -> TwinLog:
        """In the place of `layer`, whose inputs have these peaks [inputs]."""
        weight = layer.weight.detach().float()
        v = reflection(peaks) if uneven(peaks) > self.salient else torch.zeros_like(peaks)
        if self.rotated:
            weight = rotation(weight, v.to(weight))
        codes, peaks, bases = twin_log(weight, self.bits)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return TwinLog(
            of_codes(codes),
            peaks,
            bases,
            v.float(),
            bias,
            bits=self.bits,
            input_bits=self.input_bits,
            rotated=self.rotated,
        )

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        activations = self.tokens * model.config.hidden_size * 4
        return Needs(forward_tokens=2 * self.tokens, memory_mb=4 * activations / 2**20)


def channel_peaks(layers: Mapping[str, nn.Linear], run: Callable[[], object]) -> dict[str, Tensor]:
    """The largest absolute value [inputs] of every input of each layer while something runs."""
    peaks: dict[str, Tensor] = {}

    def see(name: str, u: Tensor) -> None:
        rows = u.flatten(0, -2)
        if len(rows):
            here = rows.abs().amax(0)
            peaks[name] = torch.maximum(peaks[name], here) if name in peaks else here

    with watched(layers, see):
        run()
    return peaks


def uneven(peaks: Tensor) -> float:
    """How many times the median channel the largest is."""
    return float(peaks.max() / peaks.median().clamp_min(1e-30))


def reflection(direction: Tensor) -> Tensor:
    """The unit vector v for which H (I - 2 v v^T) turns `direction` [I] to one with equal entries; 0 if H does."""
    unit = direction / direction.norm().clamp_min(1e-30)
    even = torch.full_like(unit, len(unit) ** -0.5)
    v = unit - rotation(even, torch.zeros_like(even))  # H is its own inverse
    size = v.norm()
    return v / size if size > 1e-6 else torch.zeros_like(v)


TRANSFORM = LogRotation
