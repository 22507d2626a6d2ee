"""Text from a model."""

from __future__ import annotations

import pytest
import torch

from seqmix.core.errors import CheckpointError, DataError, RangeError
from seqmix.data.text import Corpus
from seqmix.generate import Beams, Sampling, generate, generate_texts
from seqmix.models.backbone import ModelSpec
from seqmix.models.pretrained import quiet
from seqmix.train.language import prepare

SPEC = ModelSpec(layout="gated_linear_attention, attention", width=32, heads=2)
PROMPT = "To be, or not"


@pytest.fixture(scope="module")
def model():
    made, words = prepare(SPEC, "bytes", Corpus("c", ("x",)), seed=0)
    with torch.no_grad():  # only printable letters, clearly apart
        made.model.backbone.norm.weight.fill_(8.0)
        made.model.embedding.weight[128:] = 0
    return made.eval(), words


def test_greedy_is_the_likeliest_token(model):
    made, words = model
    ids = words(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(6):
        ids = torch.cat([ids, made(ids).logits[:, -1:].argmax(-1)], dim=1)
    text = generate(made, PROMPT, new_tokens=6, tokenizer=words)
    assert text == words.decode(ids[0])
    assert text.startswith(PROMPT)


def test_sampling_follows_the_seed_and_leaves_the_callers(model):
    made, words = model
    before = torch.random.get_rng_state()
    options = {"new_tokens": 12, "temperature": 1.5, "tokenizer": words}
    texts = [generate(made, PROMPT, seed=seed, **options) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_narrow_sampling_is_greedy(model):
    made, words = model
    greedy = generate(made, PROMPT, new_tokens=8, tokenizer=words)
    assert generate(made, PROMPT, new_tokens=8, top_k=1, tokenizer=words) == greedy
    assert generate(made, PROMPT, new_tokens=8, top_p=1e-6, tokenizer=words) == greedy
    assert generate(made, PROMPT, new_tokens=8, temperature=1e-4, tokenizer=words) == greedy


def test_beams_find_a_likelier_text(model):
    made, words = model

    def likelihood(text):
        ids = words(text, return_tensors="pt")["input_ids"]
        start = len(PROMPT)
        losses = made(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        return losses.gather(1, ids[0, start:, None]).sum().item()

    options = {"new_tokens": 6, "tokenizer": words}
    assert likelihood(generate(made, PROMPT, method=Beams(width=8), **options)) >= likelihood(
        generate(made, PROMPT, **options)
    )


def test_stream_brings_the_same_text_in_pieces(model):
    made, words = model
    pieces = []
    options = {"new_tokens": 10, "temperature": 2.0, "seed": 4, "tokenizer": words}
    text = generate(made, PROMPT, stream=pieces.append, **options)
    assert len(pieces) > 1
    assert PROMPT + "".join(pieces) == text == generate(made, PROMPT, **options)


def test_a_stop_string_ends_the_text_before_it(model):
    made, words = model
    options = {"new_tokens": 30, "seed": 4, "method": Sampling(), "tokenizer": words}
    text = generate(made, PROMPT, **options)[len(PROMPT) :]
    for stop in (text[5:8], text[7], text[3:12]):
        pieces = []
        (found,) = generate_texts(
            made, PROMPT, stop=["\u2603", stop], stream=pieces.append, **options
        )
        assert found.text == text[: text.index(stop)] == "".join(pieces)
        assert found.is_ended
        assert len(found.ids) <= text.index(stop) + len(stop)
    (found,) = generate_texts(made, PROMPT, stop=["\u2603"], **options)
    assert (found.text, found.is_ended) == (text, False)


def test_an_end_token_ends_the_text(model):
    made, words = model
    (found,) = generate_texts(made, PROMPT, new_tokens=6, tokenizer=words)
    before = made.generation_config.eos_token_id
    made.generation_config.eos_token_id = [found.ids[2]]
    try:
        (ended,) = generate_texts(made, PROMPT, new_tokens=6, tokenizer=words)
    finally:
        made.generation_config.eos_token_id = before
    assert ended.ids == found.ids[: found.ids.index(found.ids[2]) + 1]
    assert ended.is_ended


def test_several_texts(model):
    made, words = model
    options = {"new_tokens": 6, "tokenizer": words}
    found = generate_texts(made, PROMPT, texts=3, method=Sampling(), seed=2, **options)
    for place, text in enumerate(found):
        alone = generate(made, PROMPT, method=Sampling(), seed=2 + place, **options)
        assert alone == PROMPT + text.text


def test_from_a_folder(model, tmp_path):
    made, words = model
    with quiet():
        made.save_pretrained(tmp_path)
        words.save_pretrained(tmp_path)
        text = generate(tmp_path, PROMPT, new_tokens=5)
    assert text == generate(made, PROMPT, new_tokens=5, tokenizer=words)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"new_tokens": 0}, RangeError),
        ({"temperature": -1.0}, RangeError),
        ({"top_k": 0}, RangeError),
        ({"top_p": 1.5}, RangeError),
        ({"method": Beams(), "temperature": 1.0}, RangeError),
        ({"stop": [""]}, RangeError),
        ({"method": Beams(), "stream": print}, RangeError),
        ({"prompt": ""}, DataError),
        ({"model": "./nowhere"}, CheckpointError),
        ({"tokenizer": None}, DataError),
    ],
)
def test_bad_input(model, options, error):
    arguments = {"model": model[0], "prompt": PROMPT, "tokenizer": model[1]} | options
    with pytest.raises(error):
        generate(**arguments)
