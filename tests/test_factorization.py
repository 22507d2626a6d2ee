"""Factors in the place of weights: what they compute, how near they are, and what they leave out."""

import copy

import pytest
import torch
from torch import nn

from seqmix.compress import Calibration, Work, parse_recipe
from seqmix.compress._activations import linear_layers, second_moments
from seqmix.compress.low_rank import factorised, rank_for
from seqmix.core.errors import ConfigError, RangeError
from seqmix.linears.low_rank import LowRankLinear
from seqmix.mixers import MIXERS
from seqmix.models.hf import SeqmixForCausalLM, create

CAUSAL = [name for name in MIXERS.names() if MIXERS.get(name).causal]


def tiny(layout="2x[attention]", **fields):
    fields = {"width": 32, "heads": 2, "vocabulary": 50} | fields
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create(layout, **fields).double().eval()


def text(windows=6, length=32):
    generator = torch.Generator().manual_seed(1)
    return Calibration(windows=torch.randint(0, 50, (windows, length), generator=generator))


def fit(recipe, model, work=None):
    return parse_recipe(recipe)[0].fit(model, text(), work or Work())


@torch.no_grad()
def logits(model):
    return model(text().windows[:2, :20]).logits


def test_factors_of_full_rank_are_the_layer():
    layer = nn.Linear(12, 7).double()
    factors = factorised(layer, 7, torch.eye(12).double() * 3)
    x = torch.randn(2, 5, 12).double()
    torch.testing.assert_close(factors(x), layer(x))
    torch.testing.assert_close(factors.to_dense()(x), layer(x))
    assert factors.cost(4).flops == 2 * 4 * 7 * (12 + 7)


def test_the_error_on_the_inputs_is_the_least_that_any_matrix_of_this_rank_makes():
    layer = nn.Linear(12, 9, bias=False).double()
    inputs = torch.randn(400, 12).double() * torch.logspace(-2, 1, 12)
    moments = inputs.T @ inputs / len(inputs)
    weight = layer.weight.detach()

    def error(other):
        return float((inputs @ (weight - other).T).square().sum(-1).mean())

    best = factorised(layer, 4, moments).to_dense().weight.detach()
    tail = torch.linalg.eigvalsh(weight @ moments @ weight.T)[:-4].sum()
    assert error(best) == pytest.approx(float(tail), rel=1e-6)
    assert error(factorised(layer, 4).to_dense().weight.detach()) > 1.1 * error(best)


def test_a_rank_leaves_the_share_of_entries_and_none_where_no_rank_has_so_few():
    layer = nn.Linear(60, 40)
    rank = rank_for(layer, 0.5)
    assert rank * 100 <= 0.5 * 2400 < (rank + 1) * 100
    assert rank_for(nn.Linear(60, 1), 0.5) == 0
    with pytest.raises(RangeError, match="rank=41"):
        LowRankLinear.empty(layer, rank=41)


@pytest.mark.parametrize("mixer", CAUSAL)
def test_every_mixer_can_be_factorised(mixer, tmp_path):
    model = tiny(f"2x[{mixer}]")
    before = copy.deepcopy(model.state_dict())
    cheaper = fit("low_rank:0.4", model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert cheaper.num_parameters() < 0.85 * model.num_parameters()
    assert not torch.equal(logits(cheaper), logits(model))
    cheaper.save_pretrained(tmp_path)
    loaded = SeqmixForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded), logits(cheaper), rtol=0, atol=0)


def test_weights_that_are_only_read_stay_dense():
    work = Work()
    fit("low_rank:0.2", tiny("hyena/mixture_of_experts"), work)
    assert work.notes["ranks"]
    assert not any("kernel" in place or "router" in place for place in work.notes["ranks"])


def test_moments_are_those_of_the_inputs():
    block = tiny().model.backbone.blocks[0]
    x = torch.randn(3, 8, 32).double()
    found = second_moments(block, dict(linear_layers(block)), x)
    normed = block.mixer_norm(x).flatten(0, 1)
    torch.testing.assert_close(found["mixer.query"], (normed.T @ normed / 24).detach())
    assert found.keys() == {
        *(f"mixer.{name}" for name in ("query", "key", "value", "output")),
        *(f"channel.{name}" for name in ("gate", "up", "output")),
    }


def test_layers_can_be_chosen_and_factors_are_not_factorised_again():
    model = tiny("attention, mamba")
    work = Work()
    once = fit("low_rank(layers=channel)", model, work)
    assert all("channel" in place for place in work.notes["ranks"])
    with pytest.raises(ConfigError, match="leaves no dense linear layer"):
        fit("low_rank(layers=channel)", once)
    twice = fit("low_rank:0.25", once, work)
    assert not any("channel" in place for place in work.notes["ranks"])
    assert twice.num_parameters() < once.num_parameters()


@pytest.mark.parametrize("option", ["remove=1.0", "remove=-0.1", "tokens=0"])
def test_impossible_options_are_refused(option):
    with pytest.raises(ConfigError, match="low_rank: "):
        parse_recipe(f"low_rank({option})")
