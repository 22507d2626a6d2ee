"""Activation sparsity: the error of truncation, what the search guarantees, and the laws that are fitted."""

import numpy as np
import pytest
import torch
from torch import nn

from seqmix.core.errors import ConfigError, DataError, RangeError
from seqmix.measure.activation_sparsity import (
    activation_sparsity,
    contributions,
    sparsest,
    truncation_error,
)
from seqmix.measure.sparsity_laws import falling_logspace_power_law, rising_power_law
from seqmix.models.channel_mixers import channel_outputs
from seqmix.models.hf import create


def model(channel):
    torch.manual_seed(0)
    made = create(
        "attention", width=32, depth=2, heads=2, vocabulary=64, channel=channel, tied=False
    )
    made.model.head.weight.data *= 20  # certain of what it says
    return made.eval()


def spoken(made):
    """Texts that the model itself writes, so that it loses by every neuron that is dropped."""
    start = torch.arange(8).unsqueeze(-1)
    return made.generate(input_ids=start, max_new_tokens=16, do_sample=False)


def test_error_of_truncation_is_that_of_the_dropped_contributions():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    threshold = contributions(x, weight).median()
    errors = []
    for row in x:
        dropped = sum(
            (v * w for v, w in zip(row, weight.T, strict=True) if abs(v) * w.norm() <= threshold),
            torch.zeros(3),
        )
        errors.append(dropped.norm() / (weight @ row).norm())
    torch.testing.assert_close(truncation_error(x, weight, threshold), torch.stack(errors).mean())


def test_error_of_truncation_ends_at_nothing_and_everything():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 8).relu(), torch.randn(4, 8)
    assert truncation_error(x, weight, 0.0) == 0
    assert truncation_error(x, weight, contributions(x, weight).max()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "channel", ["glu", "glu(activation=relu)", "mlp(activation=relu)", "squared_relu"]
)
def test_perplexity_stays_within_what_was_allowed(channel):
    made = model(channel)
    for increase in (0.001, 0.02):
        found = activation_sparsity(made, spoken(made), increase=increase)
        assert found.loss <= found.dense_loss + np.log1p(increase) + 1e-6
        assert 0 < found.ratio < 1
        assert len(found.by_layer) == 2
        assert found.ratio == pytest.approx(np.mean(found.by_layer))


def test_more_perplexity_buys_more_sparsity():
    made = model("glu")
    strict, loose = (activation_sparsity(made, spoken(made), increase=p) for p in (1e-4, 0.05))
    assert loose.ratio < strict.ratio
    assert loose.setting > strict.setting


def test_neurons_that_are_never_active_are_found():
    """Half of the neurons get no input; their share of the ratio must be gone at any threshold."""
    relu = model("mlp(activation=relu)")
    for block in relu.model.backbone.blocks:
        half = block.channel.up.weight.shape[0] // 2
        nn.init.zeros_(block.channel.up.weight[:half])
    assert activation_sparsity(relu, spoken(relu), increase=1e-4).ratio <= 0.5


def test_the_model_is_left_as_it_was():
    glu = model("glu")
    ids = spoken(glu)
    before = glu(input_ids=ids).logits
    activation_sparsity(glu, ids)
    assert torch.equal(glu(input_ids=ids).logits, before)


def test_layers_of_a_model_of_transformers_are_found():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    assert [layer.in_features for layer in channel_outputs(LlamaForCausalLM(config))] == [40] * 3


def test_a_model_without_channel_mixers_is_refused():
    with pytest.raises(ConfigError, match="channel mixers"):
        channel_outputs(model("none"))


def test_an_increase_of_nothing_is_refused():
    made = model("glu")
    with pytest.raises(RangeError, match="PPL-1%"):
        sparsest(made, spoken(made), lambda setting: lambda index, x: x == x, increase=0.0)


TOKENS = [1e5 * 2**i for i in range(7)]


def test_the_rising_law_is_recovered():
    law = rising_power_law(TOKENS, [0.4 - 20 * d**-0.5 for d in TOKENS])
    assert law.limit == pytest.approx(0.4, abs=0.005)
    assert law.exponent == pytest.approx(0.5, rel=0.1)
    assert law.explained > 0.999


def test_the_falling_law_is_recovered():
    law = falling_logspace_power_law(TOKENS, [0.1 + np.exp(-1 - 2e-3 * d**0.5) for d in TOKENS])
    assert law.limit == pytest.approx(0.1, abs=0.01)
    assert law.explained > 0.999


def test_a_law_explains_nothing_that_runs_the_other_way():
    rising, falling = [0.1, 0.15, 0.2, 0.22], [0.22, 0.2, 0.15, 0.1]
    assert rising_power_law(TOKENS[:4], falling).explained < 0.01
    assert falling_logspace_power_law(TOKENS[:4], rising).explained < 0.01


def test_too_few_points_are_refused():
    with pytest.raises(DataError, match="at least 4"):
        rising_power_law(TOKENS[:3], [0.1, 0.2, 0.3])
