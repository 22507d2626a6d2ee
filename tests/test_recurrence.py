"""A decoder with a memory between windows."""

from __future__ import annotations

import pytest
import torch

from seqmix.convert.recurrence import Recurrent
from seqmix.core.errors import RangeError, ShapeError
from seqmix.models.hf import create

WINDOW = 5


def build(layout="attention, mamba2"):
    torch.manual_seed(0)
    recurrent = Recurrent(create(layout, width=16, heads=2, vocabulary=11), window=WINDOW)
    with torch.no_grad():
        for parameter in recurrent.memory.parameters():
            parameter.normal_(std=0.5)
    return recurrent.double(), torch.randint(11, (2, 3 * WINDOW + 2))


def test_a_memory_goes_on_where_a_text_was_cut():
    model, ids = build()
    whole, after = model(ids)
    head, memory = model(ids[:, : 2 * WINDOW])
    tail, last = model(ids[:, 2 * WINDOW :], memory)
    torch.testing.assert_close(torch.cat([head, tail], dim=1), whole)
    torch.testing.assert_close(last, after)


def test_only_earlier_tokens_are_read_and_earlier_windows_are():
    model, ids = build()
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 11
    changed[:, 12] = (ids[:, 12] + 1) % 11
    (one, _), (two, _) = model(ids), model(changed)
    assert not torch.allclose(one[:, WINDOW], two[:, WINDOW]), "the memory carries nothing"
    again = ids.clone()
    again[:, 12] = changed[:, 12]
    torch.testing.assert_close(model(again)[0][:, :12], one[:, :12])


def test_every_new_weight_is_trained_through_the_windows():
    model, ids = build()
    model.loss(ids).backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("decoder.head"):  # tied, or without a part in the loss
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_the_state_does_not_grow_and_time_is_linear():
    model, _ = build("attention")
    short, long = model.cost(10 * WINDOW), model.cost(20 * WINDOW)
    assert long.state_bytes == short.state_bytes
    assert long.flops == 2 * short.flops


def test_what_does_not_fit_is_refused():
    model, ids = build()
    with pytest.raises(ShapeError, match="ids"):
        model.loss(ids[:, :1])
    with pytest.raises(RangeError, match="window=0"):
        Recurrent(create("attention", width=8, heads=2), window=0)
