"""Early exits: the states stay those of the whole model, and a threshold that nothing reaches changes nothing."""

from __future__ import annotations

import pytest
import torch

from seqmix.core.errors import RangeError
from seqmix.generate import Beams, Sampling
from seqmix.generate.early_exit import EarlyExitReader
from seqmix.generate.sampling import GREEDY
from seqmix.models.early_exit import EarlyExits
from seqmix.models.hf import create
from seqmix.testing.models import build, draw, layouts
from seqmix.train.early_exit import Agreement, train_exits
from seqmix.train.objective import objective_loss

EXITS = ["mamba/none", "none/mlp(hidden=32)"]


def four_blocks(layout="2x[mamba2, attention]"):
    torch.manual_seed(3)
    return create(layout, width=32, heads=2, vocabulary=23).eval()


def exits_of(model, layout=EXITS[0], depths=(1, 3)):
    torch.manual_seed(4)
    return EarlyExits(model, depths, layout).eval()


def deeper(reader, threshold):
    """The same reader with another threshold."""
    return EarlyExitReader(reader.exits, threshold=threshold, catch_up=reader.catch_up)


@pytest.mark.parametrize("layout", [layout for layout in layouts() if "," in layout])
def test_what_no_exit_is_sure_of_is_what_the_whole_model_says(layout):
    model = build(layout)
    depths = range(1, len(model.model.backbone.blocks))
    reader = EarlyExitReader(exits_of(model, depths=depths), threshold=1.1)
    (wanted,), (got,) = (GREEDY.run(each, draw(1, 5), new_tokens=8) for each in (model, reader))
    assert got.ids == wanted.ids
    assert got.log_probability == pytest.approx(wanted.log_probability, abs=1e-3)


@pytest.mark.parametrize("exit_layout", EXITS)
def test_states_are_those_of_the_whole_model_once_deep_blocks_have_caught_up(exit_layout):
    model, ids = four_blocks(), torch.randint(23, (2, 14))
    reader = EarlyExitReader(exits_of(model, exit_layout), threshold=0.0)
    with torch.inference_mode():
        state = reader.read(ids[:, :4]).state
        for place, threshold in enumerate([0.0, 0.0, 0.5, 1.1, 0.0, 0.5, 0.0, 0.0, 0.5], start=4):
            state = deeper(reader, threshold).read(ids[:, place : place + 1], state).state
        got = deeper(reader, 1.1).read(ids[:, 13:], state)
        wanted = model(ids).logits[:, -1:]
    torch.testing.assert_close(got.logits, wanted, rtol=1e-4, atol=1e-4)
    assert all(part is None for part in got.state.unread)


@pytest.mark.parametrize("exit_layout", EXITS)
def test_an_exit_says_what_it_says_of_the_whole_text(exit_layout):
    model, ids = four_blocks(), torch.randint(23, (1, 9))
    exits = exits_of(model, exit_layout)
    reader = EarlyExitReader(exits, threshold=0.0)
    with torch.inference_mode():
        state = reader.read(ids[:, :4]).state
        for place in range(4, 9):
            got, _, state = reader.read(ids[:, place : place + 1], state)
        hidden, _ = exits.hidden(ids)
        features, _, _ = exits.exits[0](hidden[0])
        wanted = model.model.logits(features[:, -1:])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert reader.tally.tokens == 5
    assert reader.tally.blocks == reader.tally.calls == 5


def test_without_catching_up_deep_blocks_never_see_skipped_tokens():
    model, ids = four_blocks("4x[mamba2]"), torch.randint(23, (1, 8))
    exits = exits_of(model, depths=(1,))
    sure = EarlyExitReader(exits, threshold=0.0, catch_up=False)
    with torch.inference_mode():
        state = sure.read(ids[:, :4]).state
        after = sure.read(ids[:, 4:5], state).state
    assert after.unread == [None, None]
    assert after.blocks[1:] == state.blocks[1:]
    assert after.blocks[0] is not state.blocks[0]


def test_every_way_of_decoding_takes_it():
    model = four_blocks()
    reader = EarlyExitReader(exits_of(model), threshold=0.5)
    for method in (Beams(width=3), Sampling(temperature=0.7)):
        found = method.run(reader, torch.randint(23, (1, 5)), new_tokens=6, texts=2)
        assert len(found) == 2
    assert reader.tally.blocks > 0


def test_training_makes_exits_agree_and_leaves_the_model_as_it_was():
    model = four_blocks()
    with torch.no_grad():
        model.model.head.weight.mul_(20)  # so that it is sure of something
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exits = exits_of(model, depths=(2,))
    windows = torch.randint(23, (2, 16))
    first = objective_loss(exits, windows, Agreement())
    train_exits(exits, windows, steps=25, batch=2, learning_rate=1e-2)
    assert objective_loss(exits, windows, Agreement()) < 0.7 * first
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("depths", [(0,), (4,), (2, 1), (1, 1)])
def test_depths_that_the_model_does_not_have_are_refused(depths):
    with pytest.raises(RangeError, match="from 1 to 3"):
        EarlyExits(four_blocks(), depths)
