"""Selection of long samples: the scores, and what they are measured from."""

import pytest
import torch

from seqmix.analyze.long_range import response_perplexity, segment_attention, segment_perplexity
from seqmix.core.errors import RangeError, ShapeError
from seqmix.data.selection import contextual_awareness, homologous_guidance, normalised, rank
from seqmix.models.hf import create


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create("short_convolution, attention", width=16, heads=2, vocabulary=20).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 20, (3, 24), generator=torch.Generator().manual_seed(0))


def test_guidance_is_highest_where_only_the_long_context_helps():
    short = torch.tensor([9.0, 9.0, 1.0, 5.0])
    long = torch.tensor([1.0, 9.0, 1.0, 5.0])
    guidance = homologous_guidance(short, long)
    assert guidance.argmax() == 0
    assert guidance.sum() == pytest.approx(1)
    assert guidance[1] == guidance[2] == guidance[3]  # hard or easy for both: nothing to learn


def test_awareness_is_high_where_attention_rests_on_useless_segments():
    perplexities = torch.tensor([[1.0, 9.0, 9.0], [1.0, 9.0, 9.0]])
    attention = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9]])
    useful, useless = contextual_awareness(attention, perplexities)
    assert useless > useful


def test_rank_puts_the_highest_first_and_alpha_decides_between_the_scores():
    guidance, awareness = torch.tensor([0.1, 0.7, 0.2]), torch.tensor([0.9, 0.1, 0.5])
    assert rank(guidance, awareness, alpha=1.0).tolist() == [1, 2, 0]
    assert rank(guidance, awareness, alpha=0.0).tolist() == [0, 2, 1]


def test_normalised_reaches_both_ends_and_survives_equal_values():
    assert normalised(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert normalised(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_response_perplexity_scores_the_last_tokens_only(model, ids):
    found = response_perplexity(model, ids, response=4)
    labels = ids.clone()
    labels[:, :-4] = -100
    for row in range(3):
        loss = model(input_ids=ids[row : row + 1], labels=labels[row : row + 1]).loss
        assert found[row].item() == pytest.approx(loss.exp().item(), rel=1e-4)


def test_a_segment_stands_before_the_rest(model, ids):
    found = segment_perplexity(model, ids, context=16, segments=4, response=4)
    alone = torch.cat([ids[:, 8:12], ids[:, 16:]], dim=1)
    torch.testing.assert_close(found[:, 2], response_perplexity(model, alone, response=4))


def test_attention_to_segments_adds_up_to_that_to_the_context(model, ids):
    sizes = {"context": 16, "response": 4}
    parts = segment_attention(model, ids, segments=4, **sizes)
    whole = segment_attention(model, ids, segments=1, **sizes)
    torch.testing.assert_close(parts.sum(-1, keepdim=True), whole)
    assert ((whole > 0) & (whole < 1)).all()


def test_impossible_samples_are_refused(model, ids):
    with pytest.raises(RangeError, match="1 to 23"):
        response_perplexity(model, ids, response=24)
    with pytest.raises(RangeError, match="divisor"):
        segment_perplexity(model, ids, context=16, segments=5, response=4)
    with pytest.raises(RangeError, match="alpha"):
        rank(torch.ones(2), torch.ones(2), alpha=2.0)
    with pytest.raises(ShapeError, match="each sample"):
        homologous_guidance(torch.ones(2), torch.ones(3))
    with pytest.raises(ShapeError, match="each segment"):
        contextual_awareness(torch.ones(2, 3), torch.ones(2, 4))
    unattentive = create("short_convolution", width=16, vocabulary=20)
    with pytest.raises(RangeError, match="no attention"):
        segment_attention(unattentive, ids, context=16, segments=4, response=4)
