"""States corrected by what came next."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqmix.core.errors import RangeError
from seqmix.generate.state_optimization import read_with_optimized_states
from seqmix.generate.state_optimization import score_with_optimized_states as score
from seqmix.models.hf import create

LAYOUTS = ("2x[attention]", "mamba2, rwkv4/none", "attention(window=4), gated_delta_net")


def build(layout):
    torch.manual_seed(0)
    model = create(layout, width=16, heads=2, vocabulary=11)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model, torch.randint(11, (2, 24))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_rate_it_is_a_plain_reading(layout):
    model, ids = build(layout)
    logits = model(ids[:, :-1]).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(score(model, ids, window=5, rate=0.0).flatten(), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repeated_text_gets_likelier_and_the_weights_stay(layout):
    model, ids = build(layout)
    ids = ids[:, :1].repeat(1, 24)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    plain, moved = (score(model, ids, window=4, rate=rate) for rate in (0.0, 0.05))
    torch.testing.assert_close(moved[:, :8], plain[:, :8])  # nothing can have moved yet
    assert moved[:, 8:].mean() < plain[:, 8:].mean()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_token_is_scored_before_it_is_used_and_rows_are_apart():
    model, ids = build(LAYOUTS[0])
    changed = ids.clone()
    changed[:, 15] = (ids[:, 15] + 1) % 11
    one, two = (score(model, x, window=4, rate=0.05) for x in (ids, changed))
    torch.testing.assert_close(one[:, :14], two[:, :14])
    assert not torch.allclose(one[:, 16:], two[:, 16:])
    torch.testing.assert_close(score(model, ids[:1], window=4, rate=0.05), one[:1])


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_text_goes_on_from_the_state_that_was_read(layout):
    model, ids = build(layout)
    plain, moved = (
        read_with_optimized_states(model, ids, window=4, rate=rate)[1] for rate in (0.0, 0.05)
    )
    wanted = model(ids).logits[:, -1:]
    torch.testing.assert_close(model.model(ids[:, -1:], plain)[0], wanted)
    assert not torch.allclose(model.model(ids[:, -1:], moved)[0], wanted, atol=1e-4)


def test_numbers_out_of_range_are_refused():
    model, ids = build(LAYOUTS[0])
    with pytest.raises(RangeError, match="window=0"):
        score(model, ids, window=0)
