"""Masks behind a text say what comes, and change nothing of what the frozen model reads or writes."""

from __future__ import annotations

import pytest
import torch

from seqmix.core.errors import RangeError, ShapeError
from seqmix.generate import Speculative
from seqmix.generate.multi_token import MultiTokenReader
from seqmix.generate.sampling import GREEDY
from seqmix.models.hf import create
from seqmix.models.multi_token import MultiTokenModel
from seqmix.objectives import OBJECTIVES
from seqmix.testing.models import HYBRIDS, build, close, draw
from seqmix.train.multi_token import MultiToken
from seqmix.train.objective import objective_loss, train_objective

LAYOUTS = (*HYBRIDS, "2x[rwkv7]", "2x[hyena]")


def make(layout, *, masks=3, base=None):
    """Adapters that are not zero, so that a mask which is read as a token, or a token as a mask, shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = MultiTokenModel(base or build(layout), masks=masks, rank=2)
        for adapter in model.adapters:
            torch.nn.init.normal_(adapter.up)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_texts_and_features_are_those_of_separate_readings(layout):
    model = make(layout)
    prompt = draw(1, 5)
    (wanted,) = GREEDY.run(model.base, prompt, new_tokens=9)
    reader = MultiTokenReader(model)
    (got,) = Speculative(drafter=reader, guesses=3).run(reader, prompt, new_tokens=9)
    assert got.ids == wanted.ids
    assert got.log_probability == pytest.approx(wanted.log_probability, abs=1e-3)
    ids = draw(1, 6)
    reading = reader.read(ids[:, 2:], reader.read(ids[:, :2]).state, keep=3)
    plain, _ = model.base.model(ids)
    close(reading.logits, plain[:, -3:], "logits beside masks")
    assert sorted(reader.ahead) == [4, 5, 6]
    for end, z in reader.ahead.items():
        _, state = model.base.model(ids[:, :end])
        close(z, model.read_masks(state, 1)[0], f"masks behind {end} tokens")


def test_masks_learn_what_the_model_knows_and_leave_it_alone():
    """A model that counts in a circle: with three masks a check gives up to four tokens."""
    circle = (torch.arange(24) + torch.arange(8)[:, None]) % 8
    torch.manual_seed(0)
    base = create("gated_linear_attention", width=32, heads=2, vocabulary=8)
    options = {"batch": 8, "learning_rate": 2e-2}
    train_objective(base, circle, OBJECTIVES.get("causal")(), steps=20, **options)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    logits = base(circle).logits
    model, objective = MultiTokenModel(base, masks=3, rank=4), MultiToken(every=4)
    first = objective_loss(model, circle, objective)
    train_objective(model, circle, objective, steps=20, **options)
    assert objective_loss(model, circle, objective) < 0.6 * first
    assert all(value.equal(before[name]) for name, value in base.state_dict().items())
    assert base(circle).logits.equal(logits)
    reader = MultiTokenReader(model)
    (text,) = Speculative(drafter=reader, guesses=3).run(reader, circle[:1, :5], new_tokens=24)
    assert text.ids == [(5 + i) % 8 for i in range(24)]
    assert text.checks == 6


def test_every_part_that_is_added_learns():
    model = make("attention/mixture_of_experts, mamba2")
    MultiToken(every=4).loss(model, {"input_ids": draw(2, 12)}).backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert learned == {n for n, _ in model.named_parameters() if not n.startswith("base.")}


def test_what_does_not_fit_is_refused():
    base = build("attention")
    with pytest.raises(RangeError, match="masks=0"):
        MultiTokenModel(base, masks=0)
    with pytest.raises(RangeError, match="every=0"):
        MultiToken(every=0)
    model = make("attention", base=base)
    with pytest.raises(RangeError, match="texts of 11 tokens"):
        MultiToken().loss(model, {"input_ids": draw(2, 11)})
    with pytest.raises(ShapeError, match="2 rows"):
        MultiTokenReader(model).read(draw(2, 4))
