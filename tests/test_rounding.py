"""Rounding of inputs with noise, and of turned weights to logarithmic levels: laws of the layers and the transforms."""

import copy

import pytest
import torch
from torch import nn

from seqmix.compress import Calibration, Work, parse_recipe
from seqmix.compress._quantizers import (
    BASES,
    CLIPS,
    _log_codes,
    best_step,
    noisy_error,
    to_steps,
    twin_log,
)
from seqmix.compress.log_rotation import reflection
from seqmix.core.errors import ConfigError
from seqmix.core.numerics import relative_error
from seqmix.linears.noisy import Noisy
from seqmix.linears.twin_log import TwinLog, from_log, of_codes, rotation
from seqmix.mixers import MIXERS
from seqmix.models.hf import SeqmixForCausalLM, create

CAUSAL = [name for name in MIXERS.names() if MIXERS.get(name).causal]
RECIPES = ["noisy", "log_rotation", "log_rotation:3(rotated=false, input_bits=none)"]


def text():
    generator = torch.Generator().manual_seed(1)
    return Calibration(windows=torch.randint(0, 50, (2, 32), generator=generator))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mixer", CAUSAL)
@torch.no_grad()
def test_every_mixer_can_be_rounded(mixer, recipe, tmp_path):
    model = create(f"[{mixer}/glu]", width=32, heads=4, vocabulary=50).eval()
    before = copy.deepcopy(model.state_dict())
    step = parse_recipe(recipe)[0]
    made = step.fit(model, text(), Work()).eval()
    ids = text().windows[:, :9]
    logits = made(ids).logits
    assert logits.isfinite().all()
    assert not logits.equal(model(ids).logits)
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    made.save_pretrained(tmp_path)
    assert SeqmixForCausalLM.from_pretrained(tmp_path).eval()(ids).logits.equal(logits)
    with pytest.raises(ConfigError, match="no dense linear layer"):
        step.fit(made, text(), Work())


@torch.no_grad()
def test_noise_leaves_nothing_behind_where_nothing_is_rounded():
    dense = nn.Linear(24, 10)
    layer = Noisy.of(dense, torch.rand(24), torch.tensor(1e-3), bits=16)
    x = torch.randn(5, 24)
    assert relative_error(layer(x), dense(x)) < 1e-3
    torch.testing.assert_close(layer.to_dense().bias, dense.bias)
    assert (
        relative_error(Noisy.of(dense, torch.rand(24), torch.tensor(1.0), bits=8)(x), dense(x))
        > 0.01
    )


@pytest.mark.parametrize("amplitude", [0.25, 0.5, 0.8, 1.0])
def test_the_mean_error_under_noise_is_the_closed_form(amplitude):
    x = torch.linspace(-1.3, 1.3, 27).double()
    noise = torch.linspace(-amplitude, amplitude, 200_001).double()[:, None]
    u = x + noise
    measured = (u - u.round()).square().mean(0)
    torch.testing.assert_close(noisy_error(x, amplitude), measured, rtol=0, atol=1e-5)
    torch.testing.assert_close(noisy_error(x, 0.0), (x - x.round()).square())


def test_the_best_step_is_no_worse_than_the_largest():
    x = torch.distributions.StudentT(3.0).sample((6, 400))
    errors = [
        (to_steps(x, best_step(x, 4, dim=1, clips=c), 4) - x).norm() for c in ((1.0,), (1.0, 0.6))
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_logarithmic_levels_are_the_nearest(bits):
    weight = torch.randn(5, 33)
    codes, peaks, bases = twin_log(weight, bits)
    layer = TwinLog(of_codes(codes), peaks, bases, torch.zeros(33), bits=bits)
    table = bases[:, None] ** -torch.arange(2 ** (bits - 1))
    levels = torch.cat([peaks[:, :1] * table, -peaks[:, 1:] * table], 1)[:, None]
    wrong_sign = levels * weight[..., None] < 0
    nearest = (levels - weight[..., None]).abs().masked_fill(wrong_sign, torch.inf).amin(-1)
    torch.testing.assert_close((layer.weight() - weight).abs(), nearest)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_peaks_and_bases_round_a_row_better(bits):
    weight = torch.distributions.StudentT(4.0).sample((6, 50))

    def errors(codes, peaks, bases):
        return (from_log(codes, peaks, bases, bits) - weight).square().sum(1)

    found = errors(*twin_log(weight, bits))
    largest_of = torch.stack([weight.amax(1), -weight.amin(1)], 1)
    tried = [(share * largest_of, torch.full((6,), base)) for share in CLIPS for base in BASES]
    least = torch.stack([errors(_log_codes(weight, *t, bits), *t) for t in tried]).amin(0)
    torch.testing.assert_close(found, least)


def test_bases_follow_the_weights():
    normal, tailed = torch.randn(64, 300), torch.distributions.StudentT(3.0).sample((64, 300))
    assert twin_log(tailed, 4)[2].mean() > twin_log(normal, 4)[2].mean()


@pytest.mark.parametrize("inputs", [32, 48, 7])
@torch.no_grad()
def test_rotations_keep_lengths_and_undo_themselves(inputs):
    x = torch.randn(4, inputs).double()
    v = reflection(torch.rand(inputs).double())
    turned = rotation(x, v)
    torch.testing.assert_close(turned @ turned.T, x @ x.T)
    weight = torch.randn(3, inputs).double()
    torch.testing.assert_close(rotation(weight, v) @ turned.T, weight @ x.T)


def test_one_large_channel_is_spread_evenly():
    direction = torch.full((48,), 1e-3).double()
    direction[5] = 1.0
    spread = rotation(direction, reflection(direction))
    torch.testing.assert_close(spread, torch.full_like(spread, direction.norm() / 48**0.5))
    assert rotation(direction, torch.zeros(48).double()).abs().amax() > 1.5 * spread.amax()


@torch.no_grad()
def test_turned_layers_give_their_dense_layer():
    dense = nn.Linear(48, 6)
    v = reflection(torch.rand(48))
    codes, peaks, bases = twin_log(rotation(dense.weight, v), 4)
    layer = TwinLog(of_codes(codes), peaks, bases, v, dense.bias, bits=4, rotated=True)
    x = torch.randn(3, 48)
    assert relative_error(layer(x), layer.to_dense()(x)) < 1e-5
    assert relative_error(layer(x), dense(x)) < 0.15


@pytest.mark.parametrize(
    "step", ["noisy:1", "log_rotation:5", "log_rotation(input_bits=1)", "noisy(tokens=0)"]
)
def test_impossible_options_are_refused(step):
    with pytest.raises(ConfigError, match="wanted"):
        parse_recipe(step)
