"""What claims about diffusion models share: handwritten digits, a small Transformer trained on them, its errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seqmix.claims._claim import Run
from seqmix.core.extras import require

if TYPE_CHECKING:
    from seqmix.models.diffusion_transformer import DiffusionTransformer

HELD_OUT = 300  # images


def digits() -> tuple[Tensor, Tensor]:
    """The 1797 scanned digits of scikit-learn in an order of their own: images [B, 1, 8, 8] from -1 to 1, classes."""
    data = require("sklearn.datasets", extra="harness").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images[order], torch.tensor(data.target, dtype=torch.long)[order]


def trained(run: Run) -> DiffusionTransformer:
    """A model of `run["transformer"]`, trained for `run["diffusion_steps"]` on all digits but the held-out ones."""
    from seqmix.models.diffusion_transformer import (
        Diffusion,
        DiffusionSpec,
        DiffusionTransformer,
    )

    images, classes = (part[HELD_OUT:] for part in digits())
    diffusion, random = Diffusion(), torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiffusionTransformer(DiffusionSpec(**run["transformer"]))
    steps = run["diffusion_steps"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=run["diffusion_rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run["diffusion_rate"], steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (run["diffusion_batch"],), generator=random)
        loss = diffusion.loss(model, images[rows], classes[rows], random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Judge:
    """Predicted noise and samples of a model, and how far those of others are from them.

    Noise is predicted on the held-out images at times drawn once; samples begin from noise drawn once.
    """

    def __init__(self, model: nn.Module, samples: int) -> None:
        from seqmix.models.diffusion_transformer import STEPS, Diffusion

        self.diffusion, random = Diffusion(), torch.Generator().manual_seed(1)
        self.images, self.classes = (part[:HELD_OUT] for part in digits())
        self.times = torch.randint(STEPS, (HELD_OUT,), generator=random)
        self.noise = torch.randn(self.images.shape, generator=random)
        self.first = torch.randn(samples, *self.images.shape[1:], generator=random)
        self.wanted = self.predicted(model), self.sampled(model)

    @torch.no_grad()
    def predicted(self, model: nn.Module) -> Tensor:
        noisy = self.diffusion.noisy(self.images, self.times, self.noise)
        found: Tensor = model(noisy, self.times, self.classes)
        return found

    def sampled(self, model: nn.Module) -> Tensor:
        return self.diffusion.sample(model, self.first, torch.arange(len(self.first)) % 10)

    def errors(self, model: nn.Module) -> dict[str, float]:
        """Squared errors over squared sizes, the loss, and the distance of the samples from held-out images."""
        found = self.predicted(model), self.sampled(model)
        noise, samples = (
            float((f - w).square().sum() / w.square().sum())
            for f, w in zip(found, self.wanted, strict=True)
        )
        return {
            "noise": noise,
            "samples": samples,
            "loss": float((found[0] - self.noise).square().mean()),
            "Frechet distance": frechet(found[1], self.images),
        }


def frechet(some: Tensor, others: Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of the pixels' means and covariances (Heusel et al. 2017)."""
    (m, c), (n, d) = (
        (x.mean(0), torch.cov(x.T)) for x in (part.flatten(1).double() for part in (some, others))
    )
    shared = torch.linalg.eigvals(c @ d).real.clamp_min(0).sqrt().sum()
    return float((m - n).square().sum() + c.trace() + d.trace() - 2 * shared)


def calibrate(model: nn.Module, samples: int) -> Any:
    """A function that runs `model` on noisy training images at all times."""
    from seqmix.models.diffusion_transformer import STEPS, Diffusion

    images, classes = (part[HELD_OUT : HELD_OUT + samples] for part in digits())
    times = torch.linspace(0, STEPS - 1, samples).long()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    noisy = Diffusion().noisy(images, times, noise)

    @torch.no_grad()
    def run() -> None:
        model(noisy, times, classes)

    return run
