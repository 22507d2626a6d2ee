"""S4D: a diagonal state space that is the same at every token, trained as a convolution, run as a recurrence.

    h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A u_t,   s_t = 2 Re(C . h_t) + D u_t      (N/2 complex pairs)
    y_t = W_o g_t * sigmoid(W_g g_t),   g_t = gelu(s_t)

Every channel has its own dt, A and C. From no state, s is a long convolution with the kernel
2 Re(C (exp(dt A) - 1) / A exp(dt A t)); from a state, exp(dt A (t + 1)) h is read beside it.
Gu et al. 2022 (arXiv:2206.11893): zero-order hold (eq. 3), initial values of section 4.2; the gated output
of Gu et al. 2021 (arXiv:2111.00396).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.cost import Cost
from seqmix.core.errors import ConfigError
from seqmix.core.numerics import widen
from seqmix.core.state import State
from seqmix.layers.initialization import initial_log_step
from seqmix.layers.precision import full_precision
from seqmix.mixers._mixer import Mixer, MixerConfig
from seqmix.ops import Case
from seqmix.ops._packing import in_rows
from seqmix.ops.long_convolution import long_convolution

INITIAL = ("lin", "inv", "legs")


@dataclass(frozen=True, kw_only=True)
class Config(MixerConfig):
    state_width: int = 64  # real numbers of state per channel: half as many complex ones
    initial: str = "lin"  # frequencies at the start: evenly spaced, inverse, or those of HiPPO-LegS

    def __post_init__(self) -> None:
        if self.state_width < 2 or self.state_width % 2:
            raise ConfigError(
                f"s4d: state_width={self.state_width}, wanted an even number of at least 2 (complex pairs)."
            )
        if self.initial not in INITIAL:
            raise ConfigError(f"s4d: initial={self.initial!r}, wanted one of {', '.join(INITIAL)}.")


class S4D(Mixer):
    """T log T time in training, linear in generation; complex state as real pairs [B, D, N/2, 2]."""

    Config = Config
    no_weight_decay: ClassVar = ("log_step", "A_log", "A_imaginary", "D")
    operator = "long_convolution"
    examples: ClassVar = {"inv": {"initial": "inv"}, "legs": {"initial": "legs", "state_width": 16}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, pairs = config.width, config.state_width // 2
        self.log_step = nn.Parameter(initial_log_step(width))
        self.A_log = nn.Parameter(torch.full((width, pairs), math.log(0.5)))
        self.A_imaginary = nn.Parameter(torch.empty(width, pairs))
        with torch.no_grad():
            self.A_imaginary.copy_(initial_frequencies(config.initial, pairs))
        self.C = nn.Parameter(torch.randn(width, pairs, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(width))
        self.gate = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def initial_state(self, batch: int, like: Tensor) -> State:
        pairs = self.config.state_width // 2
        return {"recurrent": like.new_zeros(batch, self.config.width, pairs, 2).float()}

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """dt A, (exp(dt A) - 1) / A and C, all complex [D, N/2]."""
        log_step, A_log, imaginary, C = widen(self.log_step, self.A_log, self.A_imaginary, self.C)
        A = torch.complex(-A_log.exp(), imaginary)
        rate = A * log_step.exp().unsqueeze(-1)
        return rate, torch.expm1(rate) / A, torch.view_as_complex(C.contiguous())

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        rate, write, C = self._system()
        with full_precision(x):
            kernel = read(C * write, *powers(rate, x.shape[1]))[:, : x.shape[1]]
        return {"u": x, "kernel": kernel, "D": widen(self.D)[0]}, None

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        with full_precision(x):
            y, h = self._state_space(x, state, cu_seqlens)
        y = F.gelu(y).to(x.dtype)
        return self.output(y) * torch.sigmoid(self.gate(y)), {"recurrent": torch.view_as_real(h)}

    def _state_space(
        self, x: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """s [B, T, D] and the complex state [B, D, N/2] after x, in full precision."""
        texts = in_rows("s4d", cu_seqlens, x)
        rate, write, C = self._system()
        before = self.initial_state(texts.num_texts, x) if state is None else state
        h = torch.view_as_complex(before["recurrent"].to(write.real.dtype).contiguous())
        (D,) = widen(self.D)

        def compute(u: Tensor, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, State]:
            (h, lengths), length = rows, u.shape[1]
            if length == 1:  # the recurrence itself, without kernel or transform
                h = rate.exp() * h + write * u.transpose(1, 2)
                return 2 * (C * h).real.sum(-1).unsqueeze(1) + D * u, (h, lengths)
            outer, inner = powers(rate, length)
            kernel = read(C * write, outer, inner)[:, :length]
            y = long_convolution(u, kernel, D)
            if state is not None:
                y = y + read(C * rate.exp() * h, outer, inner)[..., :length].transpose(1, 2)
            decay = power(rate, lengths).movedim(-1, 0)
            h = decay * h + write * write_down(last_first(u, lengths), outer, inner)
            return y, (h, lengths)

        y, (h, _) = texts.run(compute, (x.to(write.real.dtype),), (h, texts.lengths))
        return y, h

    def operator_case(self, tokens: int, context: int) -> Case:
        return Case("mixer", {"B": 1, "T": tokens, "E": self.config.width, "L": tokens})

    def cost(self, length: int, *, context: int = 0) -> Cost:
        """As of every mixer, and the kernel and the last state: two products with the powers of the decays."""
        entries = length * self.config.width * self.config.state_width
        return super().cost(length, context=context) + Cost(flops=4 * entries)


def power(rate: Tensor, times: Tensor) -> Tensor:
    """exp(rate * times), `[..., T]` for times [T]; in double precision, since angles lose digits as they grow."""
    wide = rate.to(torch.complex128).unsqueeze(-1)
    return torch.exp(wide * times).to(rate.dtype)


def powers(rate: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Two factors `[..., I]`, `[..., J]` of exp(rate * t) at t = i J + j for t up to `length`, I and J about its root.

    Sums over the state then are products of small matrices, and the table of all powers is never made.
    """
    size = math.isqrt(max(length - 1, 0)) + 1
    place = torch.arange(size, device=rate.device)
    return power(rate, place[: -(-length // size)] * size), power(rate, place)


def read(weight: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """2 Re sum_n weight[n] exp(rate[n] t) for all t: weight [..., D, N] to [..., D, I J]."""
    left = (weight.unsqueeze(-1) * outer).transpose(-1, -2)
    real = torch.cat([left.real, -left.imag], dim=-1) @ torch.cat([inner.real, inner.imag], dim=-2)
    return 2 * real.flatten(-2)


def write_down(u: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """sum_t exp(rate t) u_t: [B, T, D], newest token first, to [B, D, N]."""
    places, size = outer.shape[-1], inner.shape[-1]
    u = F.pad(u, [0, 0, 0, places * size - u.shape[1]]).unflatten(1, (places, size))
    table = torch.view_as_real(inner.transpose(-1, -2).contiguous()).flatten(-2)  # [D, J, 2 N]
    partial = u.permute(3, 0, 1, 2).flatten(1, 2) @ table  # [D, B I, 2 N]
    partial = torch.view_as_complex(partial.unflatten(-1, (-1, 2)).unflatten(1, (-1, places)))
    return torch.einsum("dbin,dni->bdn", partial, outer)


def last_first(u: Tensor, lengths: Tensor) -> Tensor:
    """Each row [T, D] from the last token of its text back to the first; zeros after it."""
    place = lengths[:, None] - 1 - torch.arange(u.shape[1], device=u.device)
    place = place.expand(u.shape[0], -1).unsqueeze(-1)
    return u.gather(1, place.clamp_min(0).expand_as(u)) * (place >= 0)


def initial_frequencies(initial: str, pairs: int) -> Tensor:
    """Imaginary parts [N/2] of the rates: S4D-Lin, S4D-Inv or S4D-LegS."""
    n = torch.arange(pairs, dtype=torch.float64, device="cpu")
    if initial == "lin":
        return math.pi * n
    if initial == "inv":
        return 2 * pairs / math.pi * (2 * pairs / (2 * n + 1) - 1)
    root = (torch.arange(2 * pairs, dtype=torch.float64, device="cpu") + 0.5).sqrt()
    skew = torch.outer(root, root).triu(1)
    return torch.linalg.eigvalsh(-1j * (skew - skew.T))[pairs:]


MIXER = S4D
