"""Hyena: a long convolution whose kernel is a small network of the distance, between two data gates.

    [v, a, b] = conv(W_i x),   y_t = W_o (b * (kernel * (a v)) + D a v)_t
    kernel(t) = network(features(t / reach)) exp(-fading t / reach)

There is no short state: what is carried on is every convolved token, as with attention, so a step costs
time and memory that grow with the text. The kernel is defined at every distance, so any length will do.
Poli et al. 2023 (arXiv:2302.10866), sections 3.1-3.3, order 2: sine network, exponential windows that fade
to a hundredth between 0.3 and 1.5 times the reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.cost import Cost, matmul_cost
from seqmix.core.errors import ConfigError
from seqmix.core.numerics import widen
from seqmix.core.state import Growing, State
from seqmix.layers.convolution import ShortConvolution
from seqmix.layers.precision import full_precision
from seqmix.mixers._mixer import Mixer, MixerConfig
from seqmix.ops import OPERATORS, Case
from seqmix.ops._packing import Packing
from seqmix.ops.long_convolution import long_convolution

FADED = math.log(100.0)
SLOWEST, FASTEST = FADED / 1.5, FADED / 0.3


@dataclass(frozen=True, kw_only=True)
class Config(MixerConfig):
    reach: int = 1024  # tokens after which the channels have faded to a hundredth, more or less
    kernel_width: int = 32  # of the network that gives the kernel
    bands: int = 8  # frequencies among its features: 1, 2, ... waves over the reach
    convolution_size: int = 3  # of the short convolution before the gates

    def __post_init__(self) -> None:
        for name in self.fields():
            if getattr(self, name) < 1:
                raise ConfigError(f"hyena: {name}={getattr(self, name)}, wanted at least 1.")


class Hyena(Mixer):
    """T log T time; state: all T convolved tokens [B, T, D], and the short convolution's history."""

    Config = Config
    no_weight_decay: ClassVar = ("frequency", "D")
    operator = "long_convolution"
    examples: ClassVar = {"short_reach": {"reach": 16}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, hidden = config.width, config.kernel_width
        self.input = nn.Linear(width, 3 * width, bias=False)
        self.convolution = ShortConvolution(3 * width, config.convolution_size, activation=None)
        self.kernel_input = nn.Linear(1 + 2 * config.bands, hidden)
        self.kernel_hidden = nn.Linear(hidden, hidden)
        self.kernel_output = nn.Linear(hidden, width, bias=False)
        for layer in (self.kernel_input, self.kernel_hidden, self.kernel_output):
            layer.only_read = True  # `kernel` reads their weights
        self.frequency = nn.Parameter(torch.full((hidden,), 10.0))
        self.D = nn.Parameter(torch.randn(width))
        self.output = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, like: Tensor) -> State:
        return {
            "convolution": self.convolution.initial_state(batch, like),
            "signal": Growing(like.new_zeros(batch, 0, self.config.width).float()),
        }

    def kernel(self, length: int) -> Tensor:
        """The weights of the last `length` tokens, the current one first, [D, length].

        They are scaled so that each channel's window has a norm of one, whatever its reach.
        """
        c = self.config
        first, second = self.kernel_input, self.kernel_hidden
        frequency, *weights = widen(
            self.frequency,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            self.kernel_output.weight,
        )
        place = torch.arange(length, device=frequency.device)
        band = torch.arange(1, c.bands + 1, device=frequency.device)
        time = place.to(frequency.dtype)[:, None] / c.reach
        # Whole waves are taken off while places still are integers, so that no digits are lost far away.
        waves = 2 * math.pi / c.reach * (place[:, None] * band % c.reach).to(frequency.dtype)
        hidden = torch.cat([time, waves.cos(), waves.sin()], dim=-1)
        hidden = torch.sin(frequency * F.linear(hidden, weights[0], weights[1]))
        hidden = torch.sin(frequency * F.linear(hidden, weights[2], weights[3]))
        kernel = F.linear(hidden, weights[4])
        fading = torch.linspace(SLOWEST, FASTEST, c.width, device=place.device, dtype=time.dtype)
        window = torch.exp(-time * fading) * (-torch.expm1(-2 * fading / c.reach)).sqrt()
        return (kernel * window).T

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        signal, _, before = self._gated(x, state, cu_seqlens)
        with full_precision(x):
            return self._arguments(signal), before

    def _gated(
        self, x: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, State]:
        """a v, b and the history of the short convolution."""
        history = None if state is None else state["convolution"]
        mixed, history = self.convolution(self.input(x), history, cu_seqlens)
        value, first, second = mixed.chunk(3, dim=-1)
        return first * value, second, {"convolution": history}

    def _arguments(self, signal: Tensor) -> dict[str, Any]:
        return {"u": signal, "kernel": self.kernel(signal.shape[1]), "D": widen(self.D)[0]}

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        new, gate, before = self._gated(x, state, cu_seqlens)
        packing = None if cu_seqlens is None else Packing("hyena", cu_seqlens, x)
        (signal,) = widen(new)
        if (
            packing and state is None
        ):  # nothing stands before the texts: no text needs another's length
            with full_precision(x):
                kernel, (D,) = self.kernel(packing.longest), widen(self.D)
                y = long_convolution(signal, kernel, D, cu_seqlens=cu_seqlens)
            past = Growing.deferred(
                lambda: _end_together(packing.unpack(signal), packing.lengths), packing.longest
            )
            return self.output(y.to(x.dtype) * gate), {**before, "signal": past}
        signal = packing.unpack(signal) if packing else signal
        rows, length = signal.shape[:2]
        past = self.initial_state(rows, x)["signal"] if state is None else state["signal"]
        whole = torch.cat([past.tensor.to(signal.dtype), signal], dim=1)
        with full_precision(x):
            arguments = self._arguments(whole)
            if length == 1:  # one sum over the text instead of transforms of it
                y = torch.einsum("bsd,ds->bd", whole.flip(1), arguments["kernel"]).unsqueeze(1)
                y = y + arguments["D"] * signal
            else:
                y = long_convolution(**arguments)[:, past.length :]
        if packing:
            y = packing.pack(y)
            past = Growing(_end_together(whole, past.length + packing.lengths))
        else:
            past = past.append(signal)
        return self.output(y.to(x.dtype) * gate), {**before, "signal": past}

    def state_bytes(self, length: int) -> int:
        """Bytes of state per text after `length` tokens, in float32."""
        c = self.config
        return 4 * c.width * (length + 3 * (c.convolution_size - 1))

    def operator_case(self, tokens: int, context: int) -> Case:
        length = context + tokens
        return Case("mixer", {"B": 1, "T": length, "E": self.config.width, "L": length})

    def cost(self, length: int, *, context: int = 0) -> Cost:
        """Of the projections per new token, and of the kernel and the convolution over the whole text."""
        c = self.config
        whole = context + length
        total = Cost(state_bytes=self.state_bytes(whole))
        total += matmul_cost(length, c.width, 3 * c.width) + matmul_cost(length, c.width, c.width)
        for layer in (self.kernel_input, self.kernel_hidden, self.kernel_output):
            total += matmul_cost(whole, layer.in_features, layer.out_features)
        if length == 1:
            return total + Cost(flops=2.0 * whole * c.width, bytes=8.0 * whole * c.width)
        inner = OPERATORS.get(self.operator).cost(self.operator_case(length, context))
        return total + Cost(flops=inner.flops, bytes=inner.bytes)


def _end_together(signal: Tensor, lengths: Tensor) -> Tensor:
    """Shifts each row [S, D] to end at the last place, with zeros before it, which a convolution ignores."""
    place = torch.arange(signal.shape[1], device=signal.device)
    place = place - (signal.shape[1] - lengths[:, None])
    moved = signal.gather(1, place.clamp_min(0)[..., None].expand_as(signal))
    return moved * (place >= 0)[..., None]


MIXER = Hyena
