"""Search over sub-networks and bits: what a policy makes, and that predictions lead to good ones."""

import pytest
import torch

from seqmix.core.errors import ConfigError
from seqmix.linears.int8 import Int8
from seqmix.measure.footprint import stored_bytes
from seqmix.models.hf import SeqmixForCausalLM, create
from seqmix.search.policy import Space
from seqmix.search.predictor import Linear, beats, front, search_policies


def small(layout="2x[attention(heads=4)/glu(hidden=16)]", **fields):
    torch.manual_seed(0)
    return create(layout, width=32, vocabulary=50, **fields).eval()


def space_of(model):
    return Space.of(model, mixers=(0, 0.5, 1.0), channels=(0, 0.25, 1.0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(8)[None], use_cache=False).logits


def test_the_whole_model_in_32_bits_is_the_model_itself():
    model = small()
    space = space_of(model)
    assert logits(space.make(model, space.whole(32))).equal(logits(model))
    rounded = space.make(model, space.whole(8))
    kinds = {type(m) for m in rounded.modules() if isinstance(m, torch.nn.Linear)}
    assert not kinds
    assert stored_bytes(rounded) < 0.4 * stored_bytes(model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_policy_is_what_it_says_and_saves(tied, tmp_path):
    model = small(tied=tied)
    space = space_of(model)
    wanted = {
        "0 mixer": (0.5, 8),
        "0 channel": (0.25, 32),
        "1 mixer": (0.0, 8),
        "1 channel": (1.0, 8),
        "embedding": (1.0, 8),
    }
    policy = tuple(choices.index(wanted[name]) for name, choices in space.genes.items())
    made = space.make(model, policy)
    first, second = made.model.backbone.blocks
    assert first.mixer.config.heads == 2
    assert isinstance(first.mixer.query, Int8)
    assert first.channel.up.weight.shape == (4, 32)
    assert second.mixer is None
    assert isinstance(second.channel.up, Int8)
    assert isinstance(made.model.embedding, Int8)
    assert {name: tuple(choice) for name, choice in space.describe(policy).items()} == wanted
    made.save_pretrained(tmp_path)
    assert logits(SeqmixForCausalLM.from_pretrained(tmp_path)).equal(logits(made))


def test_mixers_without_units_are_whole_or_gone():
    model = small("2x[gated_delta_net/glu(hidden=16)]")
    space = Space.of(model, mixers=(0, 1.0), bits=(32,))
    policy = tuple(0 for _ in space.genes)
    assert [block.mixer for block in space.make(model, policy).model.backbone.blocks] == [None] * 2


def test_a_predictor_is_exact_for_what_is_linear_and_keeps_its_head_otherwise():
    space = space_of(small())
    policies = [space.draw(generator(seed)) for seed in range(60)]
    x = torch.stack([space.features(policy) for policy in policies])
    weight = torch.randn(x.shape[1], dtype=x.dtype, generator=generator())
    predictor = Linear.fit(x[:40], x[:40] @ weight + 3)
    torch.testing.assert_close(predictor(x[40:]), x[40:] @ weight + 3, rtol=1e-3, atol=1e-3)
    noise = torch.randn(40, dtype=x.dtype, generator=generator(1))
    assert Linear.fit(x[:40], noise)(x[40:]).std() < 0.7


def test_size_is_linear_in_the_choices():
    model = small()
    space = space_of(model)
    policies = [space.draw(generator(seed)) for seed in range(40)]
    sizes = torch.tensor([stored_bytes(space.make(model, p)) for p in policies]).double()
    x = torch.stack([space.features(policy) for policy in policies])
    error = Linear.fit(x[:30], sizes[:30])(x[30:]) - sizes[30:]
    assert float(error.abs().max()) < 0.05 * float(sizes.mean())


def test_search_finds_what_beats_random_policies():
    space = space_of(small("4x[attention/glu]"))
    weight = torch.rand(len(space.features(space.whole(8))), 2, generator=generator()).double()

    def measure(policy):
        cost, error = (space.features(policy) @ weight).tolist()
        return {"cost": cost, "error": error}

    first = [space.draw(generator(seed)) for seed in range(16)]
    found = search_policies(space, measure, first=first, rounds=2, per_round=6, guesses=150)
    assert 16 < len(found) <= 28
    assert len({m.policy for m in found}) == len(found)
    assert all(m.predicted.keys() == m.figures.keys() for m in found[16:])
    best, random = front(found), [measure(space.draw(generator(seed))) for seed in range(99, 111)]
    beaten = sum(any(beats(m.figures, other) for m in best) for other in random)
    assert beaten >= 10
    again = search_policies(space, measure, first=first, rounds=2, per_round=6, guesses=150)
    assert again == found


def test_impossible_spaces_are_named():
    with pytest.raises(ConfigError, match="and 1"):
        Space.of(small(), channels=(0.5,))
    with pytest.raises(ConfigError, match="bits"):
        Space.of(small(), bits=(4,))
    with pytest.raises(ConfigError, match="first policies"):
        search_policies(space_of(small()), dict, first=[])
