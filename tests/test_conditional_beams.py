"""The likeliest continuation that has a property."""

from __future__ import annotations

import itertools

import pytest
import torch

from seqmix.core.errors import RangeError, ShapeError
from seqmix.generate.conditional_beams import conditional_beam_search
from seqmix.models.hf import create

EOS, LENGTH = 0, 3


def build(layout="attention, mamba2"):
    torch.manual_seed(1)
    model = create(layout, width=16, heads=2, vocabulary=4)
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model, torch.tensor([[1, 2, 3, 1]])


def anything(ids, finished):
    return torch.zeros(len(ids))


def without_repetition(ids, finished):
    """No token stands beside itself, and not nothing."""
    again = (ids[:, 1:] == ids[:, :-1]).any(1) | (ids[:, 0] == EOS)
    return torch.zeros(len(ids)).masked_fill(again, -torch.inf)


@torch.no_grad()
def exhaustive(model, prompt, condition):
    best = (None, -torch.inf)
    for text in itertools.product(range(4), repeat=LENGTH):
        text = list(text)
        text = text[: text.index(EOS) + 1] if EOS in text else text
        ids = torch.tensor([text])
        logits = model(torch.cat([prompt, ids], 1)).logits[:, prompt.shape[1] - 1 : -1]
        score = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum()
        score += condition(ids, torch.tensor([True]))[0]
        if score > best[1]:
            best = (text, float(score))
    return best


@pytest.mark.parametrize("condition", [anything, without_repetition])
def test_with_enough_beams_it_finds_the_best_of_all(condition):
    model, prompt = build()
    wanted, score = exhaustive(model, prompt, condition)
    ids, found = conditional_beam_search(
        model, prompt, condition, beams=16, new_tokens=LENGTH, eos=EOS
    )
    assert ids.tolist() == wanted
    assert found == pytest.approx(score, abs=1e-4)


def test_one_beam_without_a_condition_is_greedy():
    model, prompt = build()
    ids, _ = conditional_beam_search(model, prompt, anything, beams=1, new_tokens=5)
    greedy = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert ids.tolist() == greedy[0, prompt.shape[1] :].tolist()


def test_what_is_found_has_the_property():
    model, prompt = build()
    for beams in (1, 2, 4):
        ids, score = conditional_beam_search(
            model, prompt, without_repetition, beams=beams, new_tokens=8, eos=EOS
        )
        assert score > -torch.inf
        assert (ids[1:] != ids[:-1]).all()


def test_what_does_not_fit_is_refused():
    model, prompt = build()
    with pytest.raises(ShapeError, match="prompt"):
        conditional_beam_search(model, prompt[:, :0], anything)
    with pytest.raises(RangeError, match="beams=0"):
        conditional_beam_search(model, prompt, anything, beams=0)
