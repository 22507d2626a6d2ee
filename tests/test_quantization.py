"""Weights of 8 bits: what rounding may change, what is saved, and that tokens stay apart."""

import copy
import importlib

import pytest
import torch
from torch import nn

from seqmix.compress import Calibration, Work, parse_recipe
from seqmix.compress._quantizers import four_bits
from seqmix.compress.two_four import distance
from seqmix.compress.two_four import rounded as rounded_to
from seqmix.core.errors import ConfigError
from seqmix.core.numerics import relative_error
from seqmix.linears.int4 import Int4, rounded
from seqmix.linears.int8 import Int8
from seqmix.linears.tied import Tied
from seqmix.linears.two_four import TwoFour, two_largest
from seqmix.mixers import MIXERS
from seqmix.models.hf import SeqmixForCausalLM, create
from seqmix.ops.int4_matmul import packed, unpacked

CAUSAL = [name for name in MIXERS if MIXERS.get(name).causal]


def quantized(model, recipe="int8"):
    work = Work()
    (step,) = parse_recipe(recipe)
    return step.fit(model, None, work), work


def bytes_of(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 50])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_product_is_that_of_the_rounded_weight(tokens, bias):
    layer = Int8.of(nn.Linear(96, 40, bias=bias))
    x = torch.randn(2, tokens, 96) * torch.logspace(-6, 6, 96)
    wanted = layer.to_dense()(x)
    assert layer(x).shape == wanted.shape
    assert relative_error(layer(x), wanted) < 1e-3 or not tokens
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_no_weight_moves_by_more_than_half_a_step():
    dense = nn.Linear(33, 20)
    layer = Int8.of(dense)
    moved = (layer.to_dense().weight - dense.weight).abs()
    assert (moved <= 0.501 * layer.scale[:, None]).all()
    assert layer.weight.abs().amax(1).eq(127).all()


@torch.no_grad()
def test_a_token_does_not_depend_on_others():
    layer = Int8.of(nn.Linear(64, 24))
    x = torch.randn(5, 64) * torch.tensor([1.0, 1e4, 0.0, 1e-4, 1.0])[:, None]
    alone = torch.cat([layer(row[None]) for row in x])
    for together, wanted in zip(layer(x), alone, strict=True):  # each by its own size
        torch.testing.assert_close(together, wanted, rtol=0, atol=1e-6 * float(wanted.norm()))


def test_gradients_pass_to_the_input():
    layer = Int8.of(nn.Linear(16, 8))
    x = torch.randn(3, 16, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.to_dense().weight.sum(0).expand(3, 16))


@torch.no_grad()
def test_new_weights_are_packed_again():
    first, second = (Int8.of(nn.Linear(16, 8)) for _ in range(2))
    x = torch.randn(3, 16)
    first(x)
    copied = copy.deepcopy(first)
    copied.load_state_dict(second.state_dict())
    assert copied(x).equal(second(x))


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_every_mixer_keeps_its_outputs(name, tmp_path):
    model = create(f"2x[{name}/glu]", width=64, heads=4, vocabulary=100).eval()
    made, _ = quantized(model)
    ids = torch.randint(100, (2, 12))
    before = copy.deepcopy(model.state_dict())
    logits = made(ids).logits
    wanted = model(ids).logits
    # Of most tokens: where a norm follows a weight near zero, as at a text's first tokens, rounding may turn its sign.
    assert ((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.1
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    kinds = {type(m) for m in made.modules()}
    assert Int8 in kinds
    assert Tied in kinds
    assert all(m.only_read for m in made.modules() if type(m) is nn.Linear)
    made.save_pretrained(tmp_path)
    again = SeqmixForCausalLM.from_pretrained(tmp_path).eval()
    for key, value in made.state_dict().items():
        assert again.state_dict()[key].equal(value)
        assert again.state_dict()[key].dtype == value.dtype
    assert again(ids).logits.equal(logits)


@torch.no_grad()
def test_the_shared_table_stays_one_and_a_byte_per_weight_is_left():
    model = create("2x[attention]", width=64, vocabulary=1000).eval()
    made, work = quantized(model)
    assert bytes_of(made) < 0.3 * bytes_of(model) * 0.95
    assert work.notes["layers"] == 2 * 7 + 2
    assert not any(key.startswith("model.head") for key in made.state_dict())
    generated = made.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False)
    full = made(generated).logits[0, 2:-1].argmax(-1)
    assert generated[0, 3:].equal(full)


def test_the_layers_can_be_chosen():
    model = create("1x[attention]", width=32, vocabulary=50)
    made, _ = quantized(model, "int8(layers=channel)")
    assert type(made.model.embedding) is nn.Embedding
    assert type(made.model.backbone.blocks[0].channel.output) is Int8
    assert type(made.model.backbone.blocks[0].mixer.query) is nn.Linear
    with pytest.raises(ConfigError, match="no dense layer"):
        quantized(made, "int8(layers=channel)")


@pytest.mark.parametrize("inputs", [32, 96])
@torch.no_grad()
def test_four_bits_are_two_to_a_byte_and_no_copy_is_kept(inputs):
    dense = nn.Linear(inputs, 20)
    layer = Int4.of(dense, *four_bits(dense.weight, 32))
    assert layer.codes.numel() == dense.weight.numel() / 2
    assert layer.factors.shape == (20, -(-inputs // 64))
    x = torch.randn(3, inputs)
    wanted = layer.to_dense()(x)
    assert relative_error(layer(x), wanted) < 1e-3
    again = Int4.empty(dense, **layer.options)
    again(x)
    again.load_state_dict(layer.state_dict())
    assert again(x).equal(layer(x))
    assert copy.deepcopy(layer)(x).equal(layer(x))
    assert all(not isinstance(value, torch.Tensor | nn.Module) for value in vars(layer).values())
    assert bytes_of(layer) < dense.weight.numel()
    activations = 4 * 3 * (inputs + 20)
    assert layer.cost(3).bytes - activations == layer.codes.numel() + layer.factors.numel()


@torch.no_grad()
def test_a_layer_of_four_bits_follows_its_tensors_and_trains_its_inputs():
    layer = Int4.of(nn.Linear(64, 20), *four_bits(torch.randn(20, 64), 32))
    x = torch.randn(3, 64)
    y = layer(x)
    layer.codes.copy_(layer.codes.flip(0))
    layer.factors.copy_(layer.factors.flip(0))
    layer.scale.copy_(layer.scale.flip(0))
    layer.bias.copy_(layer.bias.flip(0))
    assert relative_error(layer(x), y.flip(1)) < 1e-5
    assert layer(x[:0]).shape == (0, 20)
    with torch.enable_grad():
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert relative_error(gradient, layer.to_dense().weight.sum(0).expand(3, 64)) < 1e-5


@torch.no_grad()
def test_a_shared_table_of_four_bits_costs_half_of_one_of_eight():
    model = create("1x[attention]", width=64, vocabulary=1000).eval()
    eight, four = (quantized(model, recipe)[0].model.head for recipe in ("int8", "int4"))
    activations = 4 * (64 + 1000)
    assert eight.cost(1).bytes - activations == 64 * 1000
    assert four.cost(1).bytes - activations == (64 / 2 + 1) * 1000


def test_models_saved_before_are_read_as_they_were():
    """The first of two neighbours is in the low half, q as q + 8, and m as it is."""
    assert packed(torch.tensor([[-8, 7, 1]], dtype=torch.int8)).tolist() == [[0xF0, 0x09]]
    layer = Int4.of(
        nn.Linear(4, 1, bias=False),
        torch.tensor([[1, -2, 3, -4]], dtype=torch.int8),
        torch.tensor([[5, 15]], dtype=torch.int8),
        torch.tensor([0.5]),
    )
    assert layer.codes.tolist() == [[0x69, 0x4B]]
    assert layer.factors.tolist() == [[0xF5]]
    assert layer.to_dense().weight.tolist() == [[2.5, -5.0, 22.5, -30.0]]
    assert layer(torch.eye(4)).flatten().tolist() == [2.5, -5.0, 22.5, -30.0]


def test_whole_numbers_survive_packing():
    codes = torch.randint(-8, 8, (5, 7), dtype=torch.int8)
    assert unpacked(packed(codes), 7).equal(codes)
    assert packed(codes).shape == (5, 4)


@torch.no_grad()
def test_smaller_groups_round_better_and_a_group_of_its_own_does_not_mind_its_neighbours():
    weight = torch.randn(16, 128)
    weight[:, :32] *= 8
    errors = []
    for group in (16, 32, 128):
        layer = Int4.of(nn.Linear(128, 16), *four_bits(weight, group))
        errors.append(float((layer.to_dense().weight - weight)[:, 64:].norm()))
    assert max(errors[:2]) < 0.6 * errors[2]
    codes, factors, scale = four_bits(weight, 32)
    step = factors * scale[:, None]
    kept = codes.abs() < 7  # not cut off
    moved = (codes * step.repeat_interleave(32, 1) - weight).abs()
    assert (moved <= 0.501 * step.repeat_interleave(32, 1))[kept].all()


@pytest.mark.parametrize("recipe", ["int4:16", "blockwise:16"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_every_mixer_takes_four_bits(name, recipe, tmp_path):
    model = create(f"[{name}/glu]", width=64, heads=4, vocabulary=100).eval()
    before = copy.deepcopy(model.state_dict())
    made, work = quantized(model, recipe)
    ids = torch.randint(100, (2, 9))
    logits = made(ids).logits
    assert logits.isfinite().all()
    assert not logits.equal(model(ids).logits)
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    assert bytes_of(made) < 0.5 * bytes_of(model)
    assert work.notes["layers"] > 3
    made.save_pretrained(tmp_path)
    assert SeqmixForCausalLM.from_pretrained(tmp_path).eval()(ids).logits.equal(logits)


@torch.no_grad()
def test_inputs_are_rounded_block_by_block():
    x = torch.randn(2, 3, 64)
    x[..., :32] *= 1000
    near = rounded(x, 8, 32)
    assert (
        (near - x).abs() <= x.unflatten(-1, (2, 32)).abs().amax(-1).repeat_interleave(32, -1) / 253
    ).all()
    assert relative_error(near[..., 32:], x[..., 32:]) < 0.01
    assert relative_error(rounded(x, 8, 64)[..., 32:], x[..., 32:]) > 0.3


@pytest.mark.parametrize("recipe", ["int4:0", "int4:7", "blockwise:0", "blockwise(input_bits=1)"])
def test_groups_that_do_not_fit_are_refused(recipe):
    with pytest.raises(ConfigError, match=r"group=|block=|input_bits="):
        quantized(create("attention", width=64, vocabulary=64), recipe)


@pytest.mark.parametrize(("bits", "unit", "share"), [(8, 1, 5), (4, 1, 3), (4, 2, 2.5)])
@torch.no_grad()
def test_two_of_every_four_weights_stay_and_are_the_largest(bits, unit, share):
    dense = nn.Linear(48, 10)
    mask = two_largest(dense.weight, unit)
    assert mask.unflatten(1, (-1, 4 * unit)).sum(2).eq(2 * unit).all()
    units = mask.unflatten(1, (-1, 4, unit))
    assert units.any(-1).equal(units.all(-1))
    size = dense.weight.abs().unflatten(1, (-1, 4, unit)).sum(-1)
    dropped = size.masked_fill(units[..., 0], 0).amax(2)
    kept = size.masked_fill(~units[..., 0], torch.inf).amin(2)
    assert (dropped <= kept).all()
    codes, scale = rounded_to(dense.weight * mask, bits)
    layer = TwoFour.of(dense, mask, codes, scale, bits=bits, unit=unit)
    assert layer.whole().equal(codes)
    weight = layer.to_dense().weight
    assert rounded_to(weight, bits)[0].equal(codes)
    assert relative_error(weight, dense.weight * mask) < 1.5 / 2**bits
    stored = layer.values.numel() + layer.places.numel()
    assert 8 * stored == share * dense.weight.numel()
    again = TwoFour.empty(dense, **layer.options)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 48)
    assert again(x).equal(layer(x))
    with pytest.raises(ConfigError, match=f"multiple of {8 * unit}"):
        two_largest(torch.randn(3, 12), unit)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_mixer_can_be_made_two_of_four(name, tmp_path):
    model = create(f"[{name}/glu]", width=64, heads=4, vocabulary=100).eval()
    before = copy.deepcopy(model.state_dict())
    data = Calibration(windows=torch.randint(100, (4, 16)))
    work = Work()
    made = parse_recipe("two_four:1(batch=2, bits=4)")[0].fit(model, data, work)
    ids = data.windows[:2, :9]
    with torch.no_grad():
        logits = made(ids).logits
    assert logits.isfinite().all()
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    assert any(isinstance(m, TwoFour) for m in made.modules())
    made.save_pretrained(tmp_path)
    with torch.no_grad():
        assert SeqmixForCausalLM.from_pretrained(tmp_path).eval()(ids).logits.equal(logits)


@pytest.mark.parametrize("options", ["", ", bits=4, unit=2"], ids=["8 bits", "4 bits in pairs"])
def test_training_brings_two_of_four_nearer_to_the_model(options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create("attention", width=32, vocabulary=40).eval()
        data = Calibration(windows=torch.randint(40, (4, 16)))
    far = distance(two_four(model, data, 0, options), model, data.windows)
    near = distance(two_four(model, data, 30, options), model, data.windows)
    assert near < 0.7 * far


def test_the_pruned_model_teaches_the_rounded_one(monkeypatch):
    taught = []
    module = importlib.import_module("seqmix.compress.two_four")

    def seen(student, teacher, ids):
        weight = teacher.model.backbone.blocks[0].mixer.query.weight
        zeros = (weight.unflatten(1, (-1, 4)) == 0).sum(2)
        taught.append((teacher is model, int(zeros.min()), len(weight.unique()) > 200))
        return distance(student, teacher, ids)

    monkeypatch.setattr(module, "distance", seen)
    model = create("attention", width=32, vocabulary=40).eval()
    data = Calibration(windows=torch.randint(40, (4, 16)))
    two_four(model, data, 2, "")
    assert taught == 2 * [(True, 0, True)] + 2 * [(False, 2, True)]  # neither is rounded


def two_four(model, data, steps, options):
    recipe = f"two_four:{steps}(learning_rate=0.003{options})"
    return parse_recipe(recipe)[0].fit(model, data, Work())
