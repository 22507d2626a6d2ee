"""Masks behind a text say what comes, and change nothing of what the frozen model reads or writes."""

from __future__ import annotations

import pytest
import torch

from seqmix.core.errors import RangeError, ShapeError
from seqmix.generate import Speculative
from seqmix.generate.multi_token import MultiTokenReader
from seqmix.generate.sampling import GREEDY
from seqmix.models.multi_token import MultiTokenModel
from seqmix.testing.models import build, close, draw, layouts
from seqmix.train.multi_token import MultiToken
from seqmix.train.objective import train_objective


def make(layout, *, masks=3, **fields):
    """Adapters that are not zero, so that a mask which is read as a token, or a token as a mask, shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = MultiTokenModel(build(layout, **fields), masks=masks, rank=2)
        for adapter in model.adapters:
            torch.nn.init.normal_(adapter.up)
    return model


@pytest.mark.parametrize("layout", layouts())
@torch.no_grad()
def test_text_is_that_of_the_frozen_model_for_every_mixer(layout):
    model = make(layout)
    prompt = draw(1, 5)
    (wanted,) = GREEDY.run(model.base, prompt, new_tokens=14)
    reader = MultiTokenReader(model)
    (got,) = Speculative(drafter=reader, guesses=3).run(reader, prompt, new_tokens=14)
    assert got.ids == wanted.ids
    assert got.log_probability == pytest.approx(wanted.log_probability, abs=1e-3)


@pytest.mark.parametrize("layout", layouts())
@torch.no_grad()
def test_masks_read_what_stands_before_them_for_every_mixer(layout):
    """Behind each of the last tokens, in one reading, as behind the state of just the tokens before."""
    model = make(layout)
    ids = draw(1, 6)
    reader = MultiTokenReader(model)
    first = reader.read(ids[:, :2])
    reading = reader.read(ids[:, 2:], first.state, keep=3)
    plain, _ = model.base.model(ids)
    close(reading.logits, plain[:, -3:], "logits")
    assert sorted(reader.ahead) == [4, 5, 6]
    for end, z in reader.ahead.items():
        _, state = model.base.model(ids[:, :end])
        close(z, model.read_masks(state, 1)[0], f"masks after {end}")
