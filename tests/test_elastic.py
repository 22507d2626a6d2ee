"""Elastic models: a sub-network in training is the model that is taken out afterwards."""

import pytest
import torch
from torch.func import functional_call

from seqmix.compress import Calibration, Work, parse_recipe
from seqmix.compress.elastic import Elastic, Nested, first_units, narrowed, one_share, sub_network
from seqmix.core.errors import ConfigError, ShapeError
from seqmix.models.hf import create
from seqmix.train.objective import train_objective

LAYOUTS = {
    "glu": "3x[attention(heads=4)/glu(hidden=24)]",
    "grouped": "3x[attention(heads=4, key_heads=2, bias=true)/mlp(hidden=16, bias=true)]",
    "hybrid": "gated_delta_net/squared_relu(hidden=16), 2x[attention/glu(hidden=16)]",
}
SHARES = torch.tensor([[1.0, 0.25], [0.5, 1.0], [0.0, 0.5]])
NOTHING = Calibration(windows=torch.zeros(1, 2, dtype=torch.long))


def small(layout="glu", **fields):
    torch.manual_seed(0)
    return create(LAYOUTS.get(layout, layout), width=32, vocabulary=50, **fields).eval()


def ids(rows=2, length=12):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model, text):
    return model(input_ids=text, use_cache=False).logits


def always(shares):
    return lambda generator: shares


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_trained_is_what_is_taken_out(layout):
    model, text = small(layout), ids()
    loss = Nested(always(SHARES)).loss(model, {"input_ids": text, "labels": text, "shares": SHARES})
    taken = sub_network(model, SHARES)
    torch.testing.assert_close(loss, taken(input_ids=text, labels=text).loss)
    assert taken.num_parameters() < model.num_parameters()


def test_only_the_units_of_the_sub_network_learn():
    model = small()
    Nested(always(SHARES)).loss(
        model, {"input_ids": ids(), "labels": ids(), "shares": SHARES}
    ).backward()
    first, second, third = model.model.backbone.blocks
    assert first.channel.up.weight.grad[:6].abs().sum(1).gt(0).all()
    assert not first.channel.up.weight.grad[6:].any()
    assert not second.mixer.query.weight.grad[16:].any()
    assert third.mixer.query.weight.grad is None


def test_the_model_is_whole_again_after_a_sub_network():
    model, text = small("grouped"), ids()
    before, state = logits(model, text), {n: t.clone() for n, t in model.state_dict().items()}
    with narrowed(model, SHARES) as tensors:
        narrow = functional_call(model, tensors, kwargs={"input_ids": text}).logits
    assert not narrow.equal(before)
    fail = narrowed(model, SHARES)
    fail.__enter__()
    fail.__exit__(KeyError, KeyError(), None)
    assert logits(model, text).equal(before)
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())


def test_shares_between_the_first_and_the_last_block_lie_on_a_line():
    (transform,) = parse_recipe("elastic:0.25(last=0.75, heads=0.5)")
    work = Work()
    made = transform.fit(small(), NOTHING, work)
    assert [block.channel.config.hidden for block in made.model.backbone.blocks] == [6, 12, 18]
    assert {block.mixer.config.heads for block in made.model.backbone.blocks} == {2}
    assert work.notes["kept"]["1 channel"] == 12


def test_smaller_sub_networks_are_parts_of_larger_ones():
    model, text = small(), ids()
    half = Elastic(share=0.5).fit(model, NOTHING, Work())
    quarter = Elastic(share=0.25).fit(model, NOTHING, Work())
    again = Elastic(share=0.5).fit(half, NOTHING, Work())
    torch.testing.assert_close(logits(again, text), logits(quarter, text))


def test_nested_training_makes_narrow_models_that_a_usual_one_does_not_hold():
    text = ids(1, 16).expand(4, -1)  # learned by heart

    def trained(objective):
        model = small("2x[attention(heads=2)/mlp(hidden=64)]")
        train_objective(model, text, objective, steps=40, batch=4, learning_rate=1e-2)
        narrow = sub_network(model, torch.tensor([[1.0, 0.125]] * 2))
        return [float(m(input_ids=text, labels=text).loss.detach()) for m in (model, narrow)]

    whole, narrow = trained(Nested(one_share(2, (0.125, 1.0))))
    usual, broken = trained(Nested(one_share(2, (1.0,))))
    assert narrow < 1.5 * whole
    assert broken > 2 * usual


def test_what_cannot_be_narrowed_is_named():
    with pytest.raises(ShapeError, match=r"wanted \[3, 2\]"):
        first_units(small(), torch.ones(2, 2))
    with pytest.raises(ConfigError, match="share=0"):
        Elastic(share=0.0)
    with (
        pytest.raises(ConfigError, match="only attention"),
        narrowed(small("mamba/glu"), torch.tensor([[0.5, 1.0]])),
    ):
        pass
    with pytest.raises(ConfigError, match="no sublayer"):
        Elastic().fit(small("gated_delta_net", channel="none"), NOTHING, Work())
