"""Learning samples by heart, and measures of how varied a text is."""

from __future__ import annotations

import pytest
import torch

from seqmix.core.errors import RangeError, ShapeError
from seqmix.data.diversity import repeated_ngrams, type_token_ratio
from seqmix.models.hf import create
from seqmix.train.hyperfit import hyperfit

SAMPLES = torch.tensor(
    [[(7 * row + 3 * step * step) % 50 for step in range(12)] for row in range(4)]
)


def model():
    torch.manual_seed(0)
    return create("2x[attention]", width=32, heads=2)


def loss(made):
    with torch.no_grad():
        return made(input_ids=SAMPLES, labels=SAMPLES).loss.item()


def test_samples_are_learnt_by_heart_and_training_ends_there():
    made = model()
    record = hyperfit(
        made, SAMPLES, epochs=400, batch=2, learning_rate=1e-2, stop_at=0.1, progress=False
    )
    assert loss(made) <= 0.2
    assert record.steps < 800
    assert record.steps % 2 == 0, "only whole epochs"
    last = [entry["loss"] for entry in record.history if entry["step"] > record.steps - 2]
    assert sum(last) / len(last) <= 0.1


def test_without_a_target_every_epoch_is_run_on_every_sample():
    seen = []
    made = model()
    handle = made.model.embedding.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].clone())
    )
    record = hyperfit(made, SAMPLES, epochs=3, batch=2, learning_rate=1e-3, progress=False)
    handle.remove()
    assert record.steps == 6
    assert all(torch.equal(torch.cat(seen[i : i + 2]), SAMPLES) for i in (0, 2, 4))


def test_what_cannot_be_learnt_is_refused():
    with pytest.raises(ShapeError, match=r"wanted \[N, T\]"):
        hyperfit(model(), SAMPLES[0])
    with pytest.raises(RangeError, match="divisor"):
        hyperfit(model(), SAMPLES, batch=3)


@pytest.mark.parametrize(
    ("text", "window", "ratio"),
    [
        ("abcd", None, 1.0),
        ("aaaa", None, 0.25),
        ("aaaabc", 3, 1.0),
        ("ab", 5, 1.0),
        ("", None, 0.0),
    ],
)
def test_type_token_ratio(text, window, ratio):
    assert type_token_ratio(text, window=window) == ratio


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("abcdef", 2, 0.0),
        ("ababab", 2, 0.6),
        ("aaaa", 1, 0.75),
        ("abc", 4, 0.0),
        ("abcabc", 3, 0.25),
    ],
)
def test_repeated_ngrams(text, n, share):
    assert repeated_ngrams(text, n) == pytest.approx(share)


def test_measures_refuse_empty_windows():
    with pytest.raises(RangeError, match="window=0"):
        type_token_ratio("ab", window=0)
    with pytest.raises(RangeError, match="n=0"):
        repeated_ngrams("ab", 0)
