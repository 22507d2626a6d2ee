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


class Said(torch.nn.Module):
    """In the place of what judges confidence: these logits for the last tokens that it is asked of, -9 before them."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, features):
        said = torch.full((*features.shape[:2], 1), -9.0)
        said[:, -1, 0] = self.rows
        return said


def saying(*exits, threshold=0.5, rows=2, **fields):
    """A reader of four blocks whose exits, after 1 and 3 of them, say these logits, and its state after a prompt."""
    torch.manual_seed(3)
    model = create("2x[mamba2, attention]", width=32, heads=2, vocabulary=23, **fields).eval()
    reader = EarlyExitReader(exits_of(model), threshold=threshold)
    say(reader, *exits)
    return reader, reader.read(torch.randint(23, (rows, 4))).state


def say(reader, *exits):
    for part, logits in zip(reader.exits.exits, exits, strict=True):
        part.confidence = Said(*logits)


@pytest.mark.parametrize(
    ("exits", "blocks"),
    [
        (([5.0, 5.0], [5.0, 5.0]), 1),
        (([0.0, 0.0], [5.0, 5.0]), 1),  # exactly as sure as the threshold asks
        (([5.0, -5.0], [5.0, 5.0]), 3),  # rows go as deep as the least certain
        (([-5.0, 5.0], [-5.0, 5.0]), 4),
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_token_goes_as_deep_as_its_least_certain_row_asks(exits, blocks):
    reader, state = saying(*exits)
    reader.read(torch.ones(2, 1, dtype=torch.long), state)
    assert (reader.tally.tokens, reader.tally.blocks, reader.tally.calls) == (1, blocks, blocks)


@torch.inference_mode()
def test_deep_exits_judge_the_last_token_and_the_tally_counts_those_caught_up():
    token = torch.ones(1, 1, dtype=torch.long)
    reader, state = saying([5.0], [5.0], rows=1)
    for _ in range(2):
        state = reader.read(token, state).state
    assert state.unread[1].shape[1] == 2
    say(reader, [-5.0], [5.0])
    state = reader.read(token, state).state
    assert (reader.tally.tokens, reader.tally.blocks, reader.tally.calls) == (3, 2 + 1 + 2 * 3, 5)
    assert state.unread[1] is None
    assert state.unread[2].shape[1] == 3  # two that were caught up and the last


@torch.inference_mode()
def test_prompts_and_several_tokens_are_read_to_the_end_and_not_counted():
    reader, _ = saying([5.0, 5.0], [5.0, 5.0])
    ids = torch.randint(23, (2, 7))
    got = reader.read(ids[:, 4:], reader.read(ids[:, :4]).state, keep=2)
    wanted = reader.exits.known[0](ids).logits[:, -2:]
    torch.testing.assert_close(got.logits, wanted, rtol=1e-4, atol=1e-4)
    assert got.features.shape[1] == 3
    first = reader.read(ids[:, :1])  # of one token, a prompt all the same
    assert all(part is None for part in [*got.state.unread, *first.state.unread])
    assert (reader.tally.tokens, reader.tally.blocks, reader.tally.calls) == (0, 0, 0)


@torch.inference_mode()
def test_rows_are_chosen_with_what_they_have_not_read():
    reader, state = saying([5.0, 5.0], [5.0, 5.0])
    state = reader.read(torch.tensor([[1], [2]]), state).state
    before = state.unread[1].clone()
    say(reader, [-5.0, -5.0], [-5.0, -5.0])
    wanted = reader.read(torch.tensor([[3], [4]]), state)
    swapped = reader.read(torch.tensor([[4], [3]]), reader.select(state, [1, 0]))
    torch.testing.assert_close(swapped.logits, wanted.logits.flip(0), rtol=1e-4, atol=1e-4)
    assert state.unread[1].equal(before)  # a state is a value
    again = reader.read(torch.tensor([[3], [4]]), state)
    torch.testing.assert_close(again.logits, wanted.logits, rtol=0, atol=0)


@torch.inference_mode()
def test_positions_go_on_after_an_exit():
    reader, _ = saying([5.0, 5.0], [5.0, 5.0], positions=16)
    ids = torch.randint(23, (2, 6))
    state = reader.read(ids[:, :4]).state
    state = reader.read(ids[:, 4:5], state).state
    say(reader, [-5.0, -5.0], [-5.0, -5.0])
    got = reader.read(ids[:, 5:], state)
    wanted = reader.exits.known[0](ids).logits[:, -1:]
    torch.testing.assert_close(got.logits, wanted, rtol=1e-4, atol=1e-4)
