"""The diffusion Transformer: how it begins, what it learns, and that sampling undoes the noise."""

import pytest
import torch

from seqmix.core.errors import ConfigError, ShapeError
from seqmix.models.diffusion_transformer import (
    STEPS,
    Diffusion,
    DiffusionSpec,
    DiffusionTransformer,
)


def build(**fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = {"width": 16, "depth": 2, "heads": 2, "size": 4, "patch": 2} | fields
        return DiffusionTransformer(DiffusionSpec(**given))


def stirred(model):
    """With no weight at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def images(count=6, channels=1):
    return torch.randn(count, channels, 4, 4, generator=torch.Generator().manual_seed(2))


TIMES, CLASSES = torch.tensor([0, 5, 200, 500, 900, 999]), torch.arange(6)


def test_a_block_begins_as_the_identity():
    model = build()
    x = torch.randn(6, 4, 16)
    condition = torch.randn(6, 16)
    assert all(block(x, condition).equal(x) for block in model.blocks)
    assert not model(images(), TIMES, CLASSES).any()


@pytest.mark.parametrize("layout", ["bidirectional_attention", "mamba2, bidirectional_attention"])
def test_every_parameter_learns(layout):
    model = stirred(build(layout=layout, channels=3))
    y = model(images(channels=3), TIMES, CLASSES)
    assert y.shape == (6, 3, 4, 4)
    (y * images(channels=3)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name


def test_images_times_and_classes_matter_and_rows_are_independent():
    model = stirred(build())
    y = model(images(), TIMES, CLASSES)
    for other in (
        model(images().flip(3), TIMES, CLASSES),
        model(images(), TIMES.flip(0), CLASSES),
        model(images(), TIMES, CLASSES.flip(0)),
    ):
        assert not torch.allclose(other, y, atol=1e-3)
    alone = model(images()[2:3], TIMES[2:3], CLASSES[2:3])
    torch.testing.assert_close(alone, y[2:3])


def test_noise_takes_over_with_time_and_keeps_the_size():
    diffusion = Diffusion()
    assert float(diffusion.kept[0]) == pytest.approx(1 - 1e-4, rel=1e-4)
    assert 0 < float(diffusion.kept[-1]) < 1e-4
    assert (diffusion.kept.diff() < 0).all()
    x, noise = images(1000), torch.randn(1000, 1, 4, 4)
    for time in (0, 300, STEPS - 1):
        noisy = diffusion.noisy(x, torch.full((1000,), time), noise)
        assert float(noisy.std()) == pytest.approx(1, abs=0.05)


def test_sampling_with_the_true_noise_gives_the_image():
    diffusion, wanted = Diffusion(), images().clamp(-1, 1)

    def knows(x, times, classes):
        kept = diffusion.kept[times].view(-1, 1, 1, 1)
        return (x - kept.sqrt() * wanted) / (1 - kept).sqrt()

    for steps in (1, 7, 50):
        found = diffusion.sample(knows, torch.randn(6, 1, 4, 4), CLASSES, steps=steps)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_training_learns_the_noise():
    model, diffusion = build(), Diffusion()
    random = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.ones(64, 1, 4, 4) * torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0).view(
        -1, 1, 1, 1
    )
    losses = []
    for _ in range(60):
        loss = diffusion.loss(model, x, torch.arange(64) % 2, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.35 * sum(losses[:3]) / 3 * 10


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="patch=3"):
        build(patch=3)
    with pytest.raises(ConfigError, match="not `none`"):
        build(layout="none/mlp")
    with pytest.raises(ShapeError, match=r"wanted \[B, 1, 4, 4\]"):
        build()(images(channels=3), TIMES, CLASSES)
