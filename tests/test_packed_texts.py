"""Texts of any lengths in one row: little padding, nothing lost, nothing out of order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix.core.errors import RangeError, ShapeError
from seqmix.core.state import Growing, leaves
from seqmix.mixers import MIXERS
from seqmix.ops._packing import Batch, Packing, in_rows


def packing(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return Packing("here", bounds, torch.zeros(1, sum(lengths), 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=30).filter(any))
def test_at_most_half_of_what_is_computed_is_padding(lengths):
    seen = []

    def compute(x, state):
        seen.append(x.shape[0] * x.shape[1])
        return x, state

    row = torch.randn(1, sum(lengths), 2)
    output, _ = packing(lengths).run(compute, (row,))
    assert output.equal(row)
    assert sum(seen) <= 2 * sum(lengths)
    assert len(seen) <= max(lengths).bit_length()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
def test_every_text_meets_its_own_state_and_padding_is_zeros(lengths):
    def compute(x, pairs, absent, state):
        total, count = state
        assert absent is None
        assert pairs.shape[1] == 2 * x.shape[1]
        after = total + x.sum(1) + pairs.sum(1)
        return x.cumsum(1) + total[:, None], (after, count + 1)

    row, start = torch.randn(1, sum(lengths), 2).double(), torch.randn(len(lengths), 2).double()
    pairs = torch.cat([row, -row], dim=-1).view(1, -1, 2)  # sum to nothing
    state = (start, torch.zeros(len(lengths), dtype=torch.long))
    output, (after, count) = packing(lengths).run(compute, (row, pairs, None), state)
    alone = [x.cumsum(1) + s for x, s in zip(row.split(lengths, dim=1), start, strict=True)]
    torch.testing.assert_close(output, torch.cat(alone, dim=1))
    sums = torch.stack([x.sum(1)[0] for x in row.split(lengths, dim=1)])
    torch.testing.assert_close(after, start + sums)
    assert count.tolist() == [int(length > 0) for length in lengths]


def test_without_boundaries_rows_are_handed_through():
    x = torch.randn(3, 5, 2)
    texts = in_rows("here", None, x)
    assert type(texts) is Batch
    output, state = texts.run(lambda x, state: (x, state), (x,), "state")
    assert output is x
    assert state == "state"
    assert texts.lengths.tolist() == [5, 5, 5]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_may_be_of_any_integer_type(dtype):
    bounds = torch.tensor([0, 2, 2, 5], dtype=dtype)
    assert Packing("here", bounds, torch.zeros(1, 5, 1)).lengths.tolist() == [2, 0, 3]


@pytest.mark.parametrize(
    ("bounds", "batch", "error"),
    [
        (torch.tensor([0.0, 5.0]), 1, ShapeError),
        (torch.tensor([5]), 1, ShapeError),
        (torch.tensor([[0, 5]]), 1, ShapeError),
        ([0, 5], 1, ShapeError),
        (torch.tensor([0, 5]), 2, ShapeError),
        (torch.tensor([0, 3]), 1, RangeError),
        (torch.tensor([1, 5]), 1, RangeError),
        (torch.tensor([0, 4, 2, 5]), 1, RangeError),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(bounds, batch, error):
    with pytest.raises(error, match=r"here: .*cu_seqlens"):
        Packing("here", bounds, torch.zeros(batch, 5, 1))


def attention():
    kind = MIXERS.get("attention")
    return kind(kind.Config(width=16, heads=2))


def test_looking_at_a_state_without_gradients_loses_none():
    mixer, x = attention(), torch.randn(1, 5, 16, requires_grad=True)
    new, gradients = torch.randn(2, 1, 16), []
    for look in (False, True):
        _, state = mixer(x, cu_seqlens=torch.tensor([0, 2, 5]))
        if look:
            with torch.no_grad():
                assert all(leaf.isfinite().all() for leaf in leaves(state))
        gradients.append(torch.autograd.grad(mixer(new, state)[0].square().sum(), x)[0])
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


def test_keys_without_gradients_are_kept_for_queries_that_have_some():
    mixer = attention()
    for name, parameter in mixer.named_parameters():
        parameter.requires_grad_("query" in name)
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 5, 16))
        _, state = mixer(torch.randn(1, 1, 16), state)  # from here on there is spare room
    outputs = []
    for _ in range(3):
        y, state = mixer(torch.randn(1, 1, 16), state)
        outputs.append(y)
    torch.cat(outputs).square().sum().backward()
    assert mixer.query.weight.grad.any()


def test_appending_to_a_tensor_made_in_inference_mode():
    with torch.inference_mode():
        grown = Growing.deferred(lambda: torch.ones(1, 2, 3), 2).append(torch.zeros(1, 1, 3))
    with torch.no_grad():
        assert grown.append(torch.ones(1, 1, 3)).tensor[0, :, 0].tolist() == [1, 1, 0, 1]
