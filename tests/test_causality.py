"""Changing the direction of attention changes no weight, and comes back to what it was."""

from __future__ import annotations

import pytest
import torch

from seqmix.convert.causality import redirect
from seqmix.core.errors import ConfigError
from seqmix.models.encoder import SeqmixForMaskedLM
from seqmix.models.hf import SeqmixForCausalLM, create

LAYOUT = "attention(window=5, key_heads=1), attention/squared_relu"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create(LAYOUT, width=16, heads=2, vocabulary=20, mask_token_id=19).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(1))


def equal(one, other):
    return all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())


@pytest.mark.parametrize("direction", ["both", "prefix"])
@torch.no_grad()
def test_there_and_back_again(model, ids, direction):
    turned = redirect(model, direction)
    assert equal(model, turned)
    assert turned.config.mask_token_id == 19
    assert not torch.allclose(turned(ids).logits, model(ids).logits)
    back = redirect(turned, "causal")
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert isinstance(back, SeqmixForCausalLM)


@torch.no_grad()
def test_the_last_token_of_one_block_sees_the_same_in_every_direction(ids):
    torch.manual_seed(0)
    model = create("attention", width=16, heads=2, vocabulary=20).eval()
    for direction in ("both", "prefix"):
        turned = redirect(model, direction)
        torch.testing.assert_close(turned(ids).logits[:, -1], model(ids).logits[:, -1])
        assert not torch.allclose(turned(ids).logits[:, 0], model(ids).logits[:, 0])


def test_both_directions_make_a_masked_model_and_the_weights_are_its_own(model, ids):
    turned = redirect(model, "both")
    assert isinstance(turned, SeqmixForMaskedLM)
    with torch.no_grad():
        before = model(ids).logits
        for parameter in turned.parameters():
            parameter.add_(1.0)
        assert torch.equal(model(ids).logits, before)


def test_what_has_one_direction_is_refused(model):
    recurrent = create("attention, mamba2", width=16, heads=2, vocabulary=20)
    with pytest.raises(ConfigError, match="mamba2 has one direction"):
        redirect(recurrent, "both")
    with pytest.raises(ConfigError, match="causal, prefix, both"):
        redirect(model, "sideways")
