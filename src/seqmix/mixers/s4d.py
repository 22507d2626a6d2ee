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
from seqmix.mixers._mixer import Mixer, MixerConfig, without_decay
from seqmix.ops import Case
from seqmix.ops._operator import Packing
from seqmix.ops.long_convolution import long_convolution

INITIAL = ("lin", "inv", "legs")
SHORTEST_STEP, LONGEST_STEP = 1e-3, 1e-1  # steps are drawn between them, uniformly on a log scale


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
    operator = "long_convolution"
    examples: ClassVar = {"inv": {"initial": "inv"}, "legs": {"initial": "legs", "state_width": 16}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, pairs = config.width, config.state_width // 2
        low, high = math.log(SHORTEST_STEP), math.log(LONGEST_STEP)
        self.log_step = without_decay(nn.Parameter(low + (high - low) * torch.rand(width)))
        self.A_log = without_decay(nn.Parameter(torch.full((width, pairs), math.log(0.5))))
        self.A_imaginary = without_decay(nn.Parameter(torch.empty(width, pairs)))
        with torch.no_grad():
            self.A_imaginary.copy_(initial_frequencies(config.initial, pairs))
        self.C = nn.Parameter(torch.randn(width, pairs, 2) * 0.5**0.5)
        self.D = without_decay(nn.Parameter(torch.randn(width)))
        self.gate = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def initial_state(self, batch: int, like: Tensor) -> State:
        pairs = self.config.state_width // 2
        return {"recurrent": like.new_zeros(batch, self.config.width, pairs, 2).float()}

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """dt A, (exp(dt A) - 1) / A and C, all complex [D, N/2]."""
        log_step, A_log, imaginary, C = widen(
            self.log_step, self.A_log, self.A_imaginary, self.C
        )
        A = torch.complex(-A_log.exp(), imaginary)
        rate = A * log_step.exp().unsqueeze(-1)
        return rate, torch.expm1(rate) / A, torch.view_as_complex(C.contiguous())

    def operands(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], State]:
        rate, write, C = self._system()
        kernel = 2 * torch.einsum("dn,dnt->dt", C * write, powers(rate, x.shape[1])).real
        return {"u": x, "kernel": kernel, "D": widen(self.D)[0]}, None

    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        packing = None if cu_seqlens is None else Packing("s4d", cu_seqlens, x)
        length = packing.longest if packing else x.shape[1]
        rows = packing.num_texts if packing else x.shape[0]
        lengths = packing.lengths if packing else torch.full((rows,), length, device=x.device)
        rate, write, C = self._system()
        before = state or self.initial_state(rows, x)
        h = torch.view_as_complex(before["recurrent"].to(write.real.dtype).contiguous())

        decay = powers(rate, length + 1)  # [D, N/2, T + 1]
        (u,) = widen(x)
        u = packing.unpack(u) if packing else u
        kernel = 2 * torch.einsum("dn,dnt->dt", C * write, decay[..., :length]).real
        y = long_convolution(u, kernel, widen(self.D)[0])
        if state is not None:
            y = y + 2 * torch.einsum("dn,bdn,dnt->btd", C, h, decay[..., 1:]).real
        # Every text is shifted to end at the last place, where what it wrote has decayed 0 times.
        place = torch.arange(length, device=x.device) - (length - lengths[:, None])
        late = u.gather(1, place.clamp_min(0)[..., None].expand_as(u)) * (place >= 0)[..., None]
        added = torch.einsum("dnt,btd->bdn", decay[..., :length].flip(-1), late.to(decay.dtype))
        h = decay[..., lengths].movedim(-1, 0) * h + write * added
        if packing:
            y = packing.pack(y)
        y = F.gelu(y).to(x.dtype)
        return self.output(y) * torch.sigmoid(self.gate(y)), {"recurrent": torch.view_as_real(h)}

    def operator_case(self, tokens: int, context: int) -> Case:
        return Case("mixer", {"B": 1, "T": tokens, "E": self.config.width, "L": tokens})

    def cost(self, length: int, *, context: int = 0) -> Cost:
        """As of every mixer, and the powers of the decays, the kernel and the last state."""
        entries = length * self.config.width * self.config.state_width // 2
        return super().cost(length, context=context) + Cost(flops=(6 + 8 + 8) * entries, bytes=24 * entries)


def powers(rate: Tensor, count: int) -> Tensor:
    """exp(rate * t) for t = 0 ... count - 1, as `[..., count]`.

    Doubled again and again by one factor that is computed in double precision: the angle rate * t itself
    would lose all its digits to rounding at large t.
    """
    result = torch.ones_like(rate).unsqueeze(-1)
    wide = rate.to(torch.complex128)
    while result.shape[-1] < count:
        factor = torch.exp(wide * result.shape[-1]).to(rate.dtype)
        result = torch.cat([result, result * factor.unsqueeze(-1)], dim=-1)
    return result[..., :count]


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
