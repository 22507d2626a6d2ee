"""Encoders: what pads and neighbours may not change, and how the kinds of heads share one set of weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from seqmix.core.errors import CheckpointError, ConfigError
from seqmix.mixers import MIXERS
from seqmix.models.encoder import (
    SeqmixEncoder,
    SeqmixForMaskedLM,
    SeqmixForSequenceClassification,
    mean_of_tokens,
)
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.ops.attention import attention

BOTH_WAYS = "2x[bidirectional_attention]"


def build(layout: str = BOTH_WAYS, kind: type = SeqmixForMaskedLM) -> SeqmixForMaskedLM:
    torch.manual_seed(0)
    return kind.create(layout, width=16, heads=2, vocabulary=20, mask_token_id=19).eval()


def draw(*shape: int) -> Tensor:
    return torch.randint(0, 19, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", [BOTH_WAYS, "bidirectional_attention, mamba2"])
@torch.no_grad()
def test_pads_change_nothing_wherever_they_are(layout):
    model, ids, mask = build(layout), draw(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, 6:] = mask[2, 2:4] = 0
    logits = model(ids, attention_mask=mask).logits
    for row in range(3):
        kept = mask[row].bool()
        alone = model(ids[row : row + 1, kept]).logits[0]
        torch.testing.assert_close(logits[row, kept], alone)


@torch.no_grad()
def test_documents_of_one_row_do_not_see_each_other():
    model, ids = build(), draw(1, 9)
    segments = torch.tensor([[0] * 4 + [1] * 5])
    together = model(ids, segments=segments).logits[0]
    apart = torch.cat([model(ids[:, :4]).logits[0], model(ids[:, 4:]).logits[0]])
    torch.testing.assert_close(together, apart)


@torch.no_grad()
def test_an_encoder_reads_what_comes_later_and_a_causal_one_does_not():
    ids = draw(1, 8)
    other = ids.clone()
    other[0, 7] = (ids[0, 7] + 1) % 19
    both, causal = build(), build("2x[attention]")
    assert not torch.allclose(both(ids).logits[:, :7], both(other).logits[:, :7])
    torch.testing.assert_close(causal(ids).logits[:, :7], causal(other).logits[:, :7])


def test_the_loss_is_the_mean_over_scored_places():
    model, ids = build(), draw(2, 6)
    labels = torch.full_like(ids, -100)
    labels[0, 2], labels[1, 4] = 3, 5
    output = model(ids, labels=labels)
    wanted = -(output.logits.log_softmax(-1)[[0, 1], [2, 4], [3, 5]]).mean()
    torch.testing.assert_close(output.loss, wanted)
    summed = model(ids, labels=labels, num_items_in_batch=4).loss
    torch.testing.assert_close(summed, wanted / 2)


@torch.no_grad()
def test_one_set_of_weights_serves_every_kind(tmp_path):
    model, ids = build("2x[attention]"), draw(2, 6)
    model.save_pretrained(tmp_path)
    masked = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert isinstance(masked, SeqmixForMaskedLM)
    assert masked.config.mask_token_id == 19
    assert torch.equal(masked(ids).logits, model(ids).logits)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert isinstance(encoder, SeqmixEncoder)
    features = encoder(ids).last_hidden_state
    torch.testing.assert_close(model.model.head(features), model(ids).logits)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(causal, SeqmixForCausalLM)
    torch.testing.assert_close(causal(ids).logits, model(ids).logits)


def test_a_causal_language_model_refuses_an_encoder(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"bidirectional_attention reads the future"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_a_classifier_starts_from_a_model_and_comes_back_from_disk(tmp_path):
    model, ids = build(), draw(3, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    made = SeqmixForSequenceClassification.of(model, num_labels=4).eval()
    output = made(ids, attention_mask=mask, labels=torch.tensor([0, 3, 1]))
    assert output.logits.shape == (3, 4)
    features = made.features(ids, mask)
    pooled = torch.stack([features[0].mean(0), features[1, :3].mean(0), features[2].mean(0)])
    torch.testing.assert_close(mean_of_tokens(features, mask), pooled)
    torch.testing.assert_close(output.logits, made.classifier(pooled))
    made.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    model.save_pretrained(tmp_path / "headless")
    with pytest.raises(CheckpointError, match="classifier"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "headless")


def test_inputs_that_cannot_be_meant_are_refused():
    model, ids = build(), draw(1, 4)
    with pytest.raises(ConfigError, match="exactly one"):
        model()
    with pytest.raises(ConfigError, match="token_type_ids"):
        model(ids, token_type_ids=torch.tensor([[0, 0, 1, 1]]))
    with pytest.raises(ConfigError, match="segments"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1]]), segments=torch.zeros_like(ids))


def test_a_bidirectional_mixer_refuses_to_go_on():
    kind = MIXERS.get("bidirectional_attention")
    mixer, x = kind(kind.Config(width=8, heads=2)), torch.randn(1, 3, 8)
    with pytest.raises(ConfigError, match="in one call"):
        mixer(x, {"keys": x})
    with pytest.raises(ConfigError, match="token by token"):
        mixer.step(x[:, 0], None)


@torch.no_grad()
def test_prefix_attention_is_attention_with_the_prefix_unmasked():
    """In one call with a mask, and in three calls, the first of which is the prefix; packed as well."""
    kind = MIXERS.get("prefix_attention")
    mixer = kind(kind.Config(width=16, heads=2)).double()
    length, prefix = 11, 4
    x = torch.randn(1, length, 16, dtype=torch.float64)
    place = torch.arange(length)
    visible = (place <= place[:, None]) | (place < prefix)
    bias = torch.zeros(length, length, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    arguments, _ = mixer.operands(x)
    masked = attention(**{**arguments, "causal": False}, bias=bias)
    wanted = mixer.output(masked.flatten(-2))
    head, state = mixer(x[:, :prefix])
    middle, state = mixer(x[:, prefix:6], state)
    tail, _ = mixer(x[:, 6:], state)
    torch.testing.assert_close(torch.cat([head, middle, tail], dim=1), wanted)

    other = torch.randn(1, 3, 16, dtype=torch.float64)
    bounds = torch.tensor([0, prefix, prefix + 3])
    _, state = mixer(torch.cat([x[:, :prefix], other], dim=1), cu_seqlens=bounds)
    rest = torch.cat([x[:, prefix:], other], dim=1)
    y, _ = mixer(rest, state, cu_seqlens=torch.tensor([0, length - prefix, length - prefix + 3]))
    torch.testing.assert_close(y[:, : length - prefix], wanted[:, prefix:])


@torch.no_grad()
def test_a_prefix_model_generates_from_a_prompt_read_both_ways():
    model, ids = build("2x[prefix_attention]", SeqmixForCausalLM), draw(2, 6)
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    read = model(ids)
    tokens = [read.logits[:, -1:].argmax(-1)]
    for _ in range(2):
        read = model(tokens[-1], past_key_values=read.past_key_values)
        tokens.append(read.logits[:, -1:].argmax(-1))
    assert out[:, 6:].tolist() == torch.cat(tokens, dim=1).tolist()


def test_a_prefix_has_no_loss_of_its_own_and_what_follows_has():
    model, ids = build("2x[prefix_attention]", SeqmixForCausalLM), draw(2, 6)
    with pytest.raises(ConfigError, match="without labels"):
        model(ids, labels=ids)
    read = model(ids)
    assert model(ids, labels=ids, past_key_values=read.past_key_values).loss.isfinite()
