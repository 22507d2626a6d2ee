"""Diffusion Transformer: the noise in an image, from its patches, the time and the class, by blocks of any mixer.

    a_1, b_1, g_1, a_2, b_2, g_2 = W silu(c) + w          one W per block, zero at first; c from time and class
    x <- x + g_1 mixer((1 + a_1) norm(x) + b_1)           x <- x + g_2 channel((1 + a_2) norm(x) + b_2)

Every block thus begins as the identity. Norms have no weights of their own.
Peebles & Xie 2023 (DiT, arXiv:2212.09748), section 3.2 and figure 3, adaLN-Zero.

`Diffusion` makes noisy images and takes the noise out again:

    x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) e,   A_t = prod_{s <= t} (1 - beta_s),   beta from 1e-4 to 0.02 in 1000 steps

Ho et al. 2020 (arXiv:2006.11239), section 4; sampling without noise: Song et al. 2021 (arXiv:2010.02502), eq. 12.
Axes: B images, N channels, H rows, W columns, T patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.config import Config
from seqmix.core.errors import ConfigError, ShapeError
from seqmix.models.backbone import ModelSpec, build_channel, build_mixer
from seqmix.models.layout import Entry, parse_part

STEPS = 1000
PERIOD = 10_000.0  # the longest wave of the time's features, over 2 pi


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec(Config):
    """`layout`, `width`, `depth`, `heads` and `channel` are as of `ModelSpec`; the mixers read whole images."""

    layout: str = "bidirectional_attention(rope_base=none)"
    width: int = 128
    depth: int = 4
    heads: int = 4
    channel: str = "mlp(activation=gelu_tanh, bias=true)"
    size: int = 8  # rows and columns of an image
    channels: int = 1
    patch: int = 1  # rows and columns of a patch
    classes: int = 10

    def __post_init__(self) -> None:
        if self.patch < 1 or self.size % self.patch:
            raise ConfigError(
                f"patch={self.patch} must divide size={self.size}. Change one of them."
            )
        if self.width % 2:
            raise ConfigError(f"width={self.width}, wanted an even number, for pairs of waves.")

    def backbone(self) -> ModelSpec:
        """What the blocks are built from."""
        names = ("layout", "width", "depth", "heads", "channel")
        return ModelSpec(**{name: getattr(self, name) for name in names})


class AdaptiveBlock(nn.Module):
    """A mixer and a channel mixer whose norms and residuals follow the condition."""

    def __init__(self, entry: Entry, spec: ModelSpec) -> None:
        super().__init__()
        mixer, channel = (
            build_mixer(entry.mixer, spec),
            build_channel(entry.channel or parse_part(spec.channel), spec),
        )
        if mixer is None or channel is None:
            raise ConfigError(
                "A diffusion Transformer's blocks have a mixer and a channel mixer: not `none`."
            )
        self.mixer, self.channel = mixer, channel
        self.modulation = _zero(nn.Linear(spec.width, 6 * spec.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, T, D] and condition [B, D] to [B, T, D]."""
        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        y, _ = self.mixer(modulated(x, *parts[:2]))
        x = x + parts[2] * y
        y = self.channel(modulated(x, *parts[3:5]))
        result: Tensor = x + parts[5] * y
        return result


class DiffusionTransformer(nn.Module):
    """Noisy images, their times and classes, to the noise in them."""

    def __init__(self, spec: DiffusionSpec) -> None:
        super().__init__()
        self.spec = spec
        width, inputs = spec.width, spec.channels * spec.patch**2
        self.embedding = nn.Linear(inputs, width)
        self.positions = nn.Parameter(0.02 * torch.randn((spec.size // spec.patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(spec.classes, width)
        backbone = spec.backbone()
        self.blocks = nn.ModuleList(AdaptiveBlock(entry, backbone) for entry in backbone.entries())
        self.modulation = _zero(nn.Linear(width, 2 * width))
        self.head = _zero(nn.Linear(width, inputs))

    def forward(self, images: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        """images [B, N, H, W], times [B] from 0 to 999 and classes [B] to noise [B, N, H, W]."""
        s = self.spec
        if images.shape[1:] != (s.channels, s.size, s.size):
            raise ShapeError(
                f"images have shape {list(images.shape)}, wanted [B, {s.channels}, {s.size}, {s.size}]. "
                "Resize them, or build the model for them."
            )
        patches = F.unfold(images, s.patch, stride=s.patch).transpose(1, 2)  # [B, T, N patch^2]
        x = self.embedding(patches) + self.positions
        condition = self.time(waves(times, s.width)) + self.classes(classes)
        for block in self.blocks:
            x = block(x, condition)
        shift = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        noise = self.head(modulated(x, *shift)).transpose(1, 2)
        return F.fold(noise, (s.size, s.size), s.patch, stride=s.patch)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(1 + scale) norm(x) + shift."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def waves(times: Tensor, width: int) -> Tensor:
    """cos and sin of the times [B] at frequencies from 1 to 1 / `PERIOD`, [B, width]."""
    rates = torch.exp(
        -math.log(PERIOD) * torch.arange(width // 2, device=times.device) / (width // 2)
    )
    angles = times.float().unsqueeze(1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _zero(layer: nn.Linear) -> nn.Linear:
    """The layer, giving nothing yet."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Diffusion:
    """Images to noise and back, in `STEPS` steps."""

    def __init__(self) -> None:
        self.kept = (1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)).cumprod(0).float()

    def noisy(self, images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """x_t for images x_0 [B, ...], times [B] and noise e of the images' shape."""
        kept = self.kept.to(images.device)[times].view(-1, *[1] * (images.ndim - 1))
        return kept.sqrt() * images + (1 - kept).sqrt() * noise

    def loss(
        self, model: nn.Module, images: Tensor, classes: Tensor, random: torch.Generator
    ) -> Tensor:
        """The mean squared error of the noise that the model finds, at times and with noise drawn from `random`."""
        times = torch.randint(STEPS, (len(images),), generator=random).to(images.device)
        noise = torch.randn(images.shape, generator=random).to(images)
        return F.mse_loss(model(self.noisy(images, times, noise), times, classes), noise)

    @torch.no_grad()
    def sample(
        self,
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        noise: Tensor,
        classes: Tensor,
        *,
        steps: int = 50,
    ) -> Tensor:
        """Images of these classes [B], with entries from -1 to 1, from noise [B, ...]: the same for the same noise.

        What is found early is wrong by far more than an image can be, so it is cut to that range.
        """
        x = noise
        times = torch.linspace(STEPS - 1, 0, steps).round().long().tolist()
        for now, later in zip(times, [*times[1:], None], strict=True):
            found = model(x, torch.full((len(x),), now, device=x.device), classes)
            kept = self.kept[now]
            image = ((x - (1 - kept).sqrt() * found) / kept.sqrt()).clamp(-1, 1)
            found = (x - kept.sqrt() * image) / (1 - kept).sqrt()
            kept = torch.ones(()) if later is None else self.kept[later]
            x = kept.sqrt() * image + (1 - kept).sqrt() * found
        return x
