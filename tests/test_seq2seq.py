"""Encoder-decoders: pads, states, generation and saving; and cross-attention against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from seqmix.core.errors import ConfigError
from seqmix.core.state import select_rows
from seqmix.mixers._cross_attention import CrossAttention
from seqmix.models.backbone import ModelSpec
from seqmix.models.seq2seq import SeqmixForSeq2SeqLM

EOS, PAD = 18, 19


def spec(layout: str, **fields: object) -> ModelSpec:
    return ModelSpec.from_dict(
        {"layout": layout, "width": 16, "heads": 2, "vocabulary": 20} | fields
    )


def build(decoder: str = "attention, gated_linear_attention/none") -> SeqmixForSeq2SeqLM:
    torch.manual_seed(0)
    made = SeqmixForSeq2SeqLM.create(
        spec("2x[bidirectional_attention]"),
        spec(decoder),
        eos_token_id=EOS,
        pad_token_id=PAD,
        decoder_start_token_id=EOS,
    )
    return made.eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, EOS, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_pads_of_the_source_change_nothing():
    model, source, target = build(), draw(3, 9), draw(3, 5, seed=2)
    mask = torch.ones_like(source)
    mask[0, :4] = mask[1, 6:] = mask[2, 2:4] = 0
    logits = model(source, attention_mask=mask, labels=target).logits
    for row in range(3):
        kept = source[row : row + 1, mask[row].bool()]
        torch.testing.assert_close(logits[row], model(kept, labels=target[[row]]).logits[0])


@torch.no_grad()
def test_pads_of_the_target_change_nothing():
    model, source, target = build(), draw(2, 9), draw(2, 5, seed=2)
    mask = torch.ones_like(target)
    mask[0, :2] = 0
    logits = model(source, decoder_input_ids=target, decoder_attention_mask=mask).logits
    alone = model(source[:1], decoder_input_ids=target[:1, 2:]).logits
    torch.testing.assert_close(logits[:1, 2:], alone)


@torch.no_grad()
def test_the_target_is_read_causally_and_the_source_as_a_whole():
    model, source, target = build(), draw(1, 6), draw(1, 6, seed=2)
    logits = model(source, decoder_input_ids=target).logits
    other = target.clone()
    other[0, 4] = (target[0, 4] + 1) % EOS
    again = model(source, decoder_input_ids=other).logits
    torch.testing.assert_close(again[:, :4], logits[:, :4])
    assert not torch.allclose(again[:, 4:], logits[:, 4:])
    for place in range(6):
        changed = source.clone()
        changed[0, place] = (source[0, place] + 1) % EOS
        assert not torch.allclose(model(changed, decoder_input_ids=target).logits, logits)


@torch.no_grad()
def test_going_on_from_a_state_needs_no_source_and_equals_one_call():
    model, source, target = build(), draw(2, 7), draw(2, 6, seed=2)
    whole = model(source, decoder_input_ids=target).logits
    head = model(source, decoder_input_ids=target[:, :2])
    tail = model(decoder_input_ids=target[:, 2:], past_key_values=head.past_key_values)
    torch.testing.assert_close(torch.cat([head.logits, tail.logits], dim=1), whole)


@torch.no_grad()
def test_generation_runs_the_encoder_once_and_equals_full_forwards(monkeypatch):
    model, source = build(), draw(2, 7)
    mask = torch.ones_like(source)
    mask[0, 5:] = 0
    calls = []
    forward = model.encoder.forward
    monkeypatch.setattr(
        model.encoder, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1]
    )
    out = model.generate(
        source, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert len(calls) == 1
    written = torch.full((2, 1), EOS)
    for _ in range(5):
        logits = model(source, attention_mask=mask, decoder_input_ids=written).logits[:, -1]
        logits[:, EOS] = -torch.inf
        written = torch.cat([written, logits.argmax(-1, keepdim=True)], dim=1)
    assert out.tolist() == written.tolist()


@torch.no_grad()
def test_beams_of_a_batch_equal_beams_of_each_text():
    model, source = build(), draw(2, 7)
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    together = model.generate(source, **options)
    for row in range(2):
        alone = model.generate(source[row : row + 1], **options)[0].tolist()
        assert together[row].tolist()[: len(alone)] == alone


def test_the_loss_scores_each_label_from_what_comes_before_it():
    model, source, target = build(), draw(2, 7), draw(2, 5, seed=2)
    labels = target.clone()
    labels[0, 3:] = -100
    output = model(source, labels=labels)
    known = torch.cat([torch.full((2, 1), EOS), target[:, :-1]], dim=1)
    wanted = model(source, decoder_input_ids=known).logits.log_softmax(-1)
    wanted = wanted.gather(-1, target.unsqueeze(-1)).squeeze(-1)[labels != -100]
    torch.testing.assert_close(output.loss, -wanted.mean())
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model, source, target = build(), draw(2, 7), draw(2, 5, seed=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SeqmixForSeq2SeqLM)
    assert torch.equal(loaded(source, labels=target).logits, model(source, labels=target).logits)
    embedding = loaded.encoder.model.embedding.weight
    assert embedding is loaded.decoder.model.head.weight
    assert loaded.config.to_specs() == model.config.to_specs()


@torch.no_grad()
def test_cross_attention_is_its_definition_on_rows_and_on_packed_texts():
    mixer = CrossAttention(CrossAttention.Config(width=8, heads=2)).double()
    generator = torch.Generator().manual_seed(0)
    x, memory = (torch.randn(2, n, 8, generator=generator, dtype=torch.float64) for n in (4, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])
    state = mixer.remember(memory, mask)
    y, after = mixer(x, state)
    assert after is state
    q, k, v = mixer.query(x), mixer.key(memory), mixer.value(memory)
    for row in range(2):
        kept, heads = mask[row].bool(), []
        for part in (slice(0, 4), slice(4, 8)):
            scores = q[row, :, part] @ k[row, kept, part].T / 2
            heads.append(scores.softmax(-1) @ v[row, kept, part])
        torch.testing.assert_close(y[row], mixer.output(torch.cat(heads, dim=-1)))
    packed, _ = mixer(
        torch.cat([x[:1], x[1:, :3]], dim=1), state, cu_seqlens=torch.tensor([0, 4, 7])
    )
    torch.testing.assert_close(packed[0], torch.cat([y[0], y[1, :3]]))
    swapped, _ = mixer(x[[1, 0]], select_rows(state, [1, 0]))
    torch.testing.assert_close(swapped, y[[1, 0]])
    with pytest.raises(ConfigError, match="no memory"):
        mixer(x)


@pytest.mark.parametrize("fields", [{"width": 32}, {"vocabulary": 30}, {"tied": False}], ids=str)
def test_parts_that_do_not_fit_are_refused(fields):
    with pytest.raises(ConfigError):
        SeqmixForSeq2SeqLM.create(spec("bidirectional_attention"), spec("attention", **fields))


def test_a_decoder_that_reads_the_future_is_refused():
    with pytest.raises(ConfigError, match="future"):
        build("bidirectional_attention")


def test_a_target_is_needed():
    with pytest.raises(ConfigError, match="decoder_input_ids"):
        build()(draw(1, 4))
