"""A masked language model that writes."""

from __future__ import annotations

import pytest
import torch

from seqmix.core.errors import ConfigError, RangeError, ShapeError
from seqmix.generate.mask_predict import mask_predict
from seqmix.models.encoder import SeqmixForMaskedLM
from seqmix.objectives import OBJECTIVES
from seqmix.train.objective import train_objective

WORDS, MASK, LENGTH = 12, 12, 6


def build():
    torch.manual_seed(0)
    model = SeqmixForMaskedLM.create(
        "2x[bidirectional_attention]", width=32, heads=2, vocabulary=WORDS + 1
    )
    return model.eval(), torch.randint(WORDS, (3, 5))


@torch.no_grad()
def test_one_pass_fills_every_place_from_the_source_alone():
    model, source = build()
    masked = torch.cat([source, torch.full((3, LENGTH), MASK)], dim=1)
    wanted = model(masked).logits[:, 5:, :MASK].argmax(-1)
    assert mask_predict(model, source, length=LENGTH, mask_id=MASK, passes=1).equal(wanted)


@pytest.mark.parametrize("passes", [1, 2, 3, 6, 20])
def test_the_model_is_called_once_a_pass_and_no_more_often_than_there_are_tokens(passes):
    model, source = build()
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 5:] == MASK))
    target = mask_predict(model, source, length=LENGTH, mask_id=MASK, passes=passes)
    assert target.shape == (3, LENGTH)
    assert int(target.max()) < MASK
    counts = [hidden.sum(1).unique().tolist() for hidden in seen]
    assert len(seen) <= passes
    assert counts == [[LENGTH * (passes - n) // passes] for n in range(len(seen))]


@torch.no_grad()
def test_the_second_pass_keeps_what_the_first_was_surest_of():
    model, source = build()
    first = mask_predict(model, source, length=LENGTH, mask_id=MASK, passes=1)
    masked = torch.cat([source, torch.full((3, LENGTH), MASK)], dim=1)
    chances = model(masked).logits[:, 5:].softmax(-1)[..., :MASK].amax(-1)
    sure = chances.topk(LENGTH // 2).indices
    second = mask_predict(model, source, length=LENGTH, mask_id=MASK, passes=2)
    assert second.gather(1, sure).equal(first.gather(1, sure))


def test_a_model_that_was_fine_tuned_by_masked_targets_rewrites():
    """The target is the source, every word plus one."""
    model, _ = build()
    source = torch.randint(WORDS, (512, LENGTH))
    target = (source + 1) % WORDS
    kind = OBJECTIVES.get("masked_target")
    objective = kind(kind.Config(mask_id=MASK, tokens=LENGTH))
    texts = torch.cat([source, target], dim=1)
    train_objective(model, texts[:448], objective, steps=100, batch=32, learning_rate=1e-2)
    for passes in (1, 3):
        found = mask_predict(model, source[448:], length=LENGTH, mask_id=MASK, passes=passes)
        assert (found == target[448:]).double().mean() > 0.95


def test_what_does_not_fit_is_refused():
    model, source = build()
    with pytest.raises(ShapeError, match="source"):
        mask_predict(model, source[0], length=2, mask_id=MASK)
    with pytest.raises(RangeError, match="passes=0"):
        mask_predict(model, source, length=2, mask_id=MASK, passes=0)
    kind = OBJECTIVES.get("masked_target")
    with pytest.raises(ConfigError, match="tokens=0"):
        kind.Config(tokens=0)
