"""Slicing: a turn of the stream changes nothing, a cut changes the width, and what cannot be turned says so."""

import copy

import pytest
import torch

from seqmix.compress import Calibration, Work, parse_recipe
from seqmix.compress.slice import sliced_width
from seqmix.core.errors import ConfigError
from seqmix.models.hf import SeqmixForCausalLM, create

TURNED = [
    "attention",
    "windowed_attention",
    "linear_attention",
    "gated_linear_attention",
    "retention",
    "hgrn2",
    "delta_net",
    "gated_delta_net",
    "delta_product",
    "kimi_delta_attention",
    "mamba",
    "mamba2",
    "hyena",
    "short_convolution",
]
CUT = ["attention", "mamba", "mamba2", "2x[mamba2], attention/none", "none/mlp, mamba"]


def tiny(layout, **fields):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create(layout, **{"width": 32, "heads": 2, "vocabulary": 50} | fields).double()
        for name, parameter in model.named_parameters():
            if "norm.weight" in name:
                torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model.eval()


def text(windows=6, length=32):
    generator = torch.Generator().manual_seed(1)
    return Calibration(windows=torch.randint(0, 50, (windows, length), generator=generator))


def fit(recipe, model):
    return parse_recipe(recipe)[0].fit(model, text(), Work())


@torch.no_grad()
def logits(model):
    return model(text().windows[:2, :20]).logits


@pytest.mark.parametrize("mixer", TURNED)
def test_a_turn_alone_changes_no_output(mixer):
    model = tiny(f"2x[{mixer}]")
    before = copy.deepcopy(model.state_dict())
    turned = fit("slice:0.0", model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(turned), logits(model), rtol=1e-9, atol=1e-9)
    block = turned.model.backbone.blocks[0]
    assert float((block.mixer_shortcut.weight.detach() - torch.eye(32).double()).abs().max()) > 0.1


@pytest.mark.parametrize("fields", [{"norm": "layer", "positions": 64}, {"embedding_scale": 3.0}])
def test_layer_norms_positions_and_scales_are_turned_too(fields):
    model = tiny("attention/mlp, mamba", **fields)
    torch.testing.assert_close(logits(fit("slice:0.0", model)), logits(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", CUT)
def test_a_cut_narrows_the_stream_and_loads_again(layout, tmp_path):
    model = tiny(layout)
    cut = fit("slice:0.25", model)
    assert cut.config.hidden_size == 24
    assert cut.model.head.weight.shape == cut.model.embedding.weight.shape == (50, 24)
    error = (logits(cut) - logits(model)).norm() / logits(model).norm()
    assert 1e-6 < float(error) < 1
    cut.save_pretrained(tmp_path)
    loaded = SeqmixForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded), logits(cut), rtol=0, atol=0)
    again = fit("slice:0.0", cut)
    torch.testing.assert_close(logits(again), logits(cut), rtol=1e-9, atol=1e-9)


def test_a_stream_that_lies_in_few_directions_loses_nothing_by_a_cut():
    model = tiny("2x[attention]")
    with torch.no_grad():  # every writer leaves out the last half of the channels
        model.model.embedding.weight[:, 16:] = 0
        for block in model.model.backbone.blocks:
            block.mixer.output.weight[16:] = 0
            block.channel.output.weight[16:] = 0
    cut = fit("slice:0.5", model)
    assert cut.config.hidden_size == 16
    torch.testing.assert_close(logits(cut), logits(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("rwkv7", {}, "reads its input otherwise"),
        ("s4d", {}, "reads its input otherwise"),
        ("attention/mixture_of_experts", {}, "reads its input otherwise"),
        ("attention", {"residual": "post"}, "residual='post'"),
        ("attention", {"residual": "parallel"}, "residual='parallel'"),
    ],
)
def test_what_cannot_be_turned_says_so(layout, fields, message):
    with pytest.raises(ConfigError, match=message):
        fit("slice:0.0", tiny(layout, **fields))


def test_a_mixer_that_cannot_keep_its_inner_width_says_so():
    with pytest.raises(ConfigError, match="linear_attention has no option"):
        fit("slice:0.25", tiny("linear_attention"))


def test_widths_are_multiples_of_eight_where_they_can_be():
    assert [sliced_width(576, 0.25), sliced_width(576, 0.0), sliced_width(30, 0.0)] == [
        432,
        576,
        30,
    ]
    assert sliced_width(100, 0.25) == 72
