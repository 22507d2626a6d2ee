"""A set has no order: what a model says after it is the same, however its members are written."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from seqmix.core.errors import ConfigError, DataError, RangeError
from seqmix.generate.prompting import SetPrompt, continue_set, read_set
from seqmix.testing.models import build

MEMBERS = [[5, 6], [7], [8, 9, 10, 11], [6, 5]]
BEFORE, AFTER = [1, 2, 3], [4, 12]


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def model(request):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40, "intermediate_size": 32}
    config = transformers.AutoConfig.for_model(
        request.param, **sizes, num_attention_heads=2, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def test_every_order_gives_the_same(model):
    wanted = read_set(model, SetPrompt(BEFORE, MEMBERS, AFTER))
    text = continue_set(model, SetPrompt(BEFORE, MEMBERS, AFTER), new_tokens=6)
    for order in itertools.permutations(MEMBERS):
        prompt = SetPrompt(BEFORE, list(order), AFTER)
        torch.testing.assert_close(read_set(model, prompt), wanted, atol=1e-4, rtol=1e-4)
        assert continue_set(model, prompt, new_tokens=6) == text
    other = read_set(model, SetPrompt(BEFORE, [[6, 5], *MEMBERS[1:]], AFTER))
    assert (other - wanted).abs().max() > 1e-2  # inside a member order counts


def test_a_set_of_one_is_an_ordinary_prompt(model):
    ids = torch.tensor([BEFORE + MEMBERS[2] + AFTER])
    prompt = SetPrompt(BEFORE, [MEMBERS[2]], AFTER)
    with torch.no_grad():
        torch.testing.assert_close(read_set(model, prompt), model(ids).logits[0, -1])
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    got = continue_set(model, prompt, new_tokens=6)
    assert got == wanted[0, ids.shape[1] :].tolist()
    assert continue_set(model, prompt, new_tokens=6, ends=frozenset(got[:1])) == got[:1]


def test_members_see_the_beginning_and_themselves_alone():
    ids, positions, seen = SetPrompt([1, 2], [[3, 4], [5]], [6]).arrange()
    assert ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert positions.tolist() == [0, 1, 2, 3, 2, 4]
    rows = ["100000", "110000", "111000", "111100", "110010", "111111"]
    assert seen.int().tolist() == [[int(c) for c in row] for row in rows]


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(DataError, match="every member need"):
        SetPrompt([1], [[2], []], [3])
    with pytest.raises(DataError, match="after"):
        SetPrompt([1], [[2]], [])
    with pytest.raises(RangeError, match="new_tokens=0"):
        continue_set(model, SetPrompt([1], [[2]], [3]), new_tokens=0)
    with pytest.raises(ConfigError, match="takes no positions"):
        read_set(build("2x[mamba2]"), SetPrompt([1], [[2]], [3]))
