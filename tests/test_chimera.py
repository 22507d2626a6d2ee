"""Chimera: what it is trained on is what it computes when it drafts, and texts stay those of plain decoding."""

from __future__ import annotations

import pytest
import torch
from test_speculative import texts

from seqmix.core.errors import RangeError
from seqmix.generate import Shape, SpeculativeTree
from seqmix.generate._method import Task
from seqmix.generate.chimera import ChimeraTree
from seqmix.generate.sampling import GREEDY
from seqmix.models.chimera import Chimera
from seqmix.testing.models import build, draw
from seqmix.train.chimera import _Distillation, train_chimera


def moved(drafter):
    """The drafter with other weights than those of the beginning, most of which are zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return drafter


@pytest.mark.parametrize("layout", ["2x[attention]", "2x[mamba2]"])
def test_texts_are_those_of_plain_decoding(layout):
    model = build(layout)
    drafter = ChimeraTree(moved(Chimera(model, depth=3, heads=2)), Shape(depth=3, width=2, nodes=5))
    with torch.no_grad():
        for length in (1, 5):
            prompt = draw(1, length)
            (wanted,) = texts(model, GREEDY, prompt=prompt)
            (got,) = texts(model, SpeculativeTree(drafter=drafter), prompt=prompt)
            assert got.ids == wanted.ids


def test_drafting_computes_what_training_scores():
    """The chain of guesses along a known text: its chances at every distance give the loss."""
    model = build("mamba2, attention")
    drafter = moved(Chimera(model, depth=3, heads=2)).eval()
    ids = draw(1, 9)
    with torch.no_grad():
        features, _ = model.model.backbone(model.model.embedding(ids))
        loss = _Distillation(ids, features).loss(drafter, {"ids": ids, "features": features})
        wanted = model.model.logits(features).softmax(-1)[0]
        losses = []
        for distance in (1, 2, 3):
            each = []
            for place in range(max(distance, 2), 9):
                seen = features[:, : place - distance + 1]
                logits = drafter.ahead(
                    drafter.trigrams(ids[:, None, place - 2 : place + 1]),
                    seen[:, -1:],
                    *drafter.remember(seen),
                    distance,
                )
                each.append(-(wanted[place] * logits[0, 0].log_softmax(-1)).sum())
            losses.append(torch.stack(each).mean())
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_a_draft_sees_all_that_the_model_has_read():
    model = build("attention")
    drafter = moved(Chimera(model, depth=2, heads=2))
    ids = draw(1, 8)
    with torch.no_grad():
        features, _ = model.model.backbone(model.model.embedding(ids[:, :7]))
        draft = ChimeraTree(drafter, Shape(depth=1, width=40, nodes=40)).start(
            Task(prompt=ids[:, :5], new_tokens=9)
        )
        draft.guess(ids[0, 5:6].tolist(), features[0, :5])
        guesses = draft.guess(ids[0, 5:].tolist(), features[0, 5:])
        logits = drafter.ahead(
            drafter.trigrams(ids[:, None, -3:]), features[:, -1:], *drafter.remember(features), 1
        )
    assert guesses.tokens == logits[0, 0].argsort(descending=True).tolist()


def test_training_lowers_the_loss_and_leaves_the_model_alone():
    model = build("2x[attention]")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    drafter = Chimera(model, depth=2, heads=2)
    rows = torch.randint(0, 5, (16, 12), generator=torch.Generator().manual_seed(1))
    record = train_chimera(drafter, rows, steps=12, batch=8, learning_rate=1e-2)
    losses = [step["loss"] for step in record.history]
    assert losses[-1] < losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not {id(p) for p in drafter.parameters()} & {id(p) for p in model.parameters()}


def test_what_does_not_fit_is_refused():
    model = build("attention")
    with pytest.raises(RangeError, match="heads=3"):
        Chimera(model, heads=3)
    with pytest.raises(RangeError, match="trained for 2"):
        ChimeraTree(Chimera(model, depth=2, heads=2), Shape(depth=3))
