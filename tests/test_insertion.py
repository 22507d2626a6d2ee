"""Models that write by insertion: what their objective scores, and what they insert."""

from __future__ import annotations

import math

import pytest
import torch

from seqmix.core.errors import ConfigError, RangeError, ShapeError
from seqmix.generate.insertion import insert, put
from seqmix.models.encoder import SeqmixForMaskedLM
from seqmix.objectives.insertion import Config, Insertion
from seqmix.train.objective import train_objective

WORDS, STOP, PAD, TOKENS = 8, 8, 9, 5
IDS = {"stop_id": STOP, "pad_id": PAD}


def build():
    torch.manual_seed(0)
    model = SeqmixForMaskedLM.create(
        "2x[bidirectional_attention]", width=32, heads=2, vocabulary=WORDS + 2
    )
    return model.eval()


def texts(count: int):
    """[N, 3 + 5]: three words that tell which of three targets follows, then it, then pads."""
    targets = torch.tensor([[4, 5, 6, PAD, PAD], [6, 3, 7, 4, PAD], [5, 7, 3, 6, 4]])
    chosen = torch.randint(3, (count, 1), generator=torch.Generator().manual_seed(1))
    return torch.cat([chosen.expand(-1, 3), targets[chosen[:, 0]]], dim=1)


def test_the_number_left_out_is_even_from_none_to_all_and_the_source_stays():
    ids = texts(4000)
    objective = Insertion(Config(tokens=TOKENS, **IDS))
    inputs = objective.inputs(ids, torch.Generator().manual_seed(0))
    left_out, seen = inputs["left_out"], inputs["attention_mask"].bool()
    assert seen[:, :3].all()
    assert not (left_out & seen).any()
    assert (left_out | seen).equal(ids != PAD)
    for length in (3, 4, 5):
        counts = left_out.sum(1)[(ids != PAD).sum(1) == 3 + length]
        shares = counts.bincount().double() / len(counts)
        assert torch.allclose(shares, torch.full_like(shares, 1 / (length + 1)), atol=0.04)


def test_the_loss_is_the_cross_entropy_with_counts_by_gap_and_the_stop():
    """One text, by hand: [7 | 1 2 3 4] without 2, 3; the gap behind 1 wants each of them with 1/2."""
    model = build()
    ids = torch.tensor([[7, 1, 2, 3, 4, PAD]])
    seen = torch.tensor([[1, 1, 0, 0, 1, 0]])
    left_out = torch.tensor([[0, 0, 1, 1, 0, 0]]).bool()
    objective = Insertion(Config(tokens=TOKENS, **IDS))
    inputs = {"ids": ids, "attention_mask": seen, "left_out": left_out}
    with torch.no_grad():
        logits = model(torch.tensor([[7, 1, 4]])).logits[0]
        words = torch.arange(WORDS + 2) != STOP
        chances = logits[:, words].flatten().softmax(0).view(3, -1)
        complete = torch.sigmoid(logits[0, STOP])
        wanted = -0.5 * (chances[1, 2].log() + chances[1, 3].log()) - (1 - complete).log()
        assert math.isclose(objective.loss(model, inputs), wanted, rel_tol=1e-5)
        everything = {"ids": ids, "attention_mask": seen | left_out, "left_out": left_out & False}
        logits = model(ids[:, :5]).logits[0]
        wanted = -torch.sigmoid(logits[0, STOP]).log()
        assert math.isclose(objective.loss(model, everything), wanted, rel_tol=1e-5)


def test_tokens_are_put_where_they_belong():
    target = torch.tensor([[1, 2, PAD], [1, 2, 3], [4, PAD, PAD]])
    gap, word = torch.tensor([[0], [3], [1]]), torch.tensor([[7], [8], [PAD]])
    is_open = torch.tensor([True, True, False])
    wanted = [[7, 1, 2, PAD], [1, 2, 3, 8], [4, PAD, PAD, PAD]]
    assert put(target, gap, word, is_open, PAD).tolist() == wanted


def test_a_trained_model_writes_and_fills_gaps_of_unknown_length():
    model, rows = build(), texts(900)
    objective = Insertion(Config(tokens=TOKENS, **IDS))
    options = {"steps": 120, "batch": 16, "learning_rate": 1e-2}
    train_objective(model, rows[:800], objective, **options)
    source, target = rows[800:].split([3, TOKENS], dim=1)
    found = insert(model, source, new_tokens=TOKENS + 1, **IDS)
    assert found.shape == (100, TOKENS + 1)
    assert (found[:, :TOKENS] == target).all(1).double().mean() > 0.9
    filled = insert(model, source, new_tokens=TOKENS, given=target[:, 1:2], **IDS)
    assert (filled[:, :TOKENS] == target).all(1).double().mean() > 0.9
    drawn = insert(model, source, new_tokens=2, temperature=1.0, seed=1, **IDS)
    assert drawn.equal(insert(model, source, new_tokens=2, temperature=1.0, seed=1, **IDS))
    assert not drawn.equal(insert(model, source, new_tokens=2, temperature=1.0, seed=2, **IDS))


def test_what_does_not_fit_is_refused():
    model, source = build(), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ShapeError, match="source"):
        insert(model, source[0], new_tokens=2, **IDS)
    with pytest.raises(ShapeError, match="given"):
        insert(model, source, new_tokens=2, given=source[:1], **IDS)
    with pytest.raises(RangeError, match="new_tokens=0"):
        insert(model, source, new_tokens=0, **IDS)
    with pytest.raises(ConfigError, match="tokens=0"):
        Config(tokens=0)
