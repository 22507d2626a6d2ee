"""Small bases times sparse codes: what such a layer computes, how it is found, and that training chooses."""

import copy

import pytest
import torch
from torch import nn

from seqmix.compress import Calibration, Work, parse_recipe
from seqmix.compress.dense_sparse import Factors, factorised, pursued, sizes_for
from seqmix.core.errors import ConfigError, RangeError
from seqmix.linears.dense_sparse import DenseSparseLinear
from seqmix.mixers import MIXERS
from seqmix.models.hf import SeqmixForCausalLM, create

CAUSAL = [name for name in MIXERS.names() if MIXERS.get(name).causal]


def tiny(layout="2x[attention]", **fields):
    fields = {"width": 32, "heads": 2, "vocabulary": 50} | fields
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create(layout, **fields).eval()


def text(windows=6, length=32):
    generator = torch.Generator().manual_seed(1)
    return Calibration(windows=torch.randint(0, 50, (windows, length), generator=generator))


def fit(recipe, model):
    return parse_recipe(recipe)[0].fit(model, text(), Work())


@torch.no_grad()
def logits(model):
    return model(text().windows[:2, :20]).logits


@torch.no_grad()
def loss(model):
    ids = text().windows
    return float(model(input_ids=ids, labels=ids).loss)


def of_few_atoms(height=6, atoms=8, entries=2, inputs=200):
    """A weight [3, height, inputs] of sparse codes, and its bases."""
    generator = torch.Generator().manual_seed(0)
    basis = nn.functional.normalize(torch.randn(3, height, atoms, generator=generator), dim=1)
    chosen = torch.rand(3, atoms, inputs, generator=generator).topk(entries, dim=1).indices
    values = torch.randn(3, entries, inputs, generator=generator)
    codes = torch.zeros(3, atoms, inputs).scatter(1, chosen, values)
    return basis @ codes, basis


def error(blocks, basis, codes):
    return float((blocks - basis @ codes).norm() / blocks.norm())


def test_a_layer_is_its_blocks_one_under_the_other():
    layer = DenseSparseLinear(
        torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]),
        torch.tensor([[[1.0, 10.0, 100.0]], [[1.0, 1.0, 1.0]]]),
        torch.tensor([[[0, 1, 0]], [[1, 1, 0]]]),
        torch.tensor([0.5, 0.0]),
    )
    wanted = torch.tensor([[1.0, 20.0, 100.0], [4.0, 4.0, 3.0]])
    assert torch.equal(layer.weight, wanted)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(layer(x), x @ wanted.T + layer.bias)
    torch.testing.assert_close(layer.to_dense()(x), layer(x))
    assert layer.options == {"height": 1, "atoms": 2, "entries": 1}


@pytest.mark.parametrize(
    "sizes", [{"height": 5}, {"atoms": 300}, {"entries": 9}, {"entries": 0}], ids=str
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(RangeError, match="wanted a height"):
        DenseSparseLinear.empty(
            nn.Linear(16, 12), **{"height": 4, "atoms": 8, "entries": 2} | sizes
        )


def test_pursuit_finds_one_atom_exactly_and_never_loses_by_more():
    blocks, basis = of_few_atoms(entries=1)
    assert error(blocks, basis, pursued(blocks, basis, 1)) < 1e-5
    blocks, basis = of_few_atoms(entries=3)
    errors = [error(blocks, basis, pursued(blocks, basis, n)) for n in (1, 2, 3, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3  # six atoms span all of six rows
    assert ((pursued(blocks, basis, 2) != 0).sum(1) == 2).all()


def test_factors_come_nearer_than_a_low_rank_of_as_many_bytes():
    blocks, _ = of_few_atoms()
    basis, codes = factorised(blocks, 8, 2)
    weight = blocks.flatten(0, 1)
    rank = (3 * 6 * 8 * 4 + 3 * 2 * 200 * 5) // (4 * (18 + 200))
    values = torch.linalg.svdvals(weight)
    assert error(blocks, basis, codes) < 0.5 * float(values[rank:].norm() / values.norm())


def test_sizes_leave_the_share_of_bytes():
    layer = nn.Linear(576, 1536)
    height, atoms, entries = sizes_for(layer, 0.5, 16)
    assert (height, atoms) == (16, 32)
    kept = DenseSparseLinear.empty(layer, height=height, atoms=atoms, entries=entries)
    size = sum(t.numel() * t.element_size() for t in kept.state_dict().values()) - 4 * 1536
    more = 96 * 576 * 5  # another entry in every column
    assert size <= 0.5 * 4 * 576 * 1536 < size + more
    assert sizes_for(nn.Linear(4, 40), 0.5, 16) is None
    assert sizes_for(nn.Linear(64, 10), 0.5, 8) == (5, 8, 1)


def test_gradients_pass_to_entries_that_are_not_chosen():
    layer = Factors.of(nn.Linear(16, 8), 4, 6, 2)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), layer.sparse()(x))
    layer(x).square().sum().backward()
    assert bool((layer.codes.grad != 0).all())
    assert bool((layer.basis.grad != 0).all())
    with torch.no_grad():
        layer.codes[0, :, 0] = torch.tensor([0.0, 9.0, 0.0, 0.0, -9.0, 0.1])
    assert set(layer.sparse().chosen[0, :, 0].tolist()) == {1, 4}


@pytest.mark.parametrize("mixer", CAUSAL)
def test_every_mixer_can_be_factorised(mixer, tmp_path):
    model = tiny(mixer)
    before = copy.deepcopy(model.state_dict())
    cheaper = fit("dense_sparse(steps=1)", model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert cheaper.num_parameters() < model.num_parameters()
    cheaper.save_pretrained(tmp_path)
    loaded = SeqmixForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(cheaper), rtol=0, atol=0)


def test_training_lowers_the_loss_and_changes_the_choice():
    model = tiny()
    apart = fit("dense_sparse:0.6(steps=0)", model)
    together = fit("dense_sparse:0.6(steps=30, learning_rate=0.01)", model)
    assert loss(together) < loss(apart) - 0.05
    layers = [m.model.backbone.blocks[0].channel.up for m in (apart, together)]
    chosen = [layer.chosen.sort(1).values for layer in layers]
    assert not torch.equal(*chosen)
    assert torch.equal(apart.model.embedding.weight, together.model.embedding.weight)


def test_layers_can_be_chosen_and_codes_are_not_factorised_again():
    once = fit("dense_sparse(layers=channel, steps=0)", tiny())
    places = once.config.to_spec().replaced
    assert len(places) == 6
    assert all("channel" in place for place in places)
    with pytest.raises(ConfigError, match="leave no dense linear layer"):
        fit("dense_sparse(layers=channel)", once)


@pytest.mark.parametrize("option", ["remove=1.0", "height=129", "steps=-1", "learning_rate=0.0"])
def test_impossible_options_are_refused(option):
    with pytest.raises(ConfigError, match="dense_sparse: "):
        parse_recipe(f"dense_sparse({option})")
