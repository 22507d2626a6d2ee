"""Texts of a language: every one that ends belongs to it, and probabilities are the model's, renormalised."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
import torch

pytest.importorskip("llguidance")

from seqmix.core.errors import ConfigError, DataError
from seqmix.data.text import Corpus
from seqmix.generate import (
    Beams,
    Choice,
    Contrastive,
    DiverseBeams,
    JsonSchema,
    Pattern,
    Sampling,
    generate_texts,
)
from seqmix.models.backbone import ModelSpec
from seqmix.train.language import prepare

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "é"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", 'a "quoted"\n\\text', "né ☃", "no more"]


def holds(language, text):
    if isinstance(language, Pattern):
        return re.fullmatch(language.pattern, text) is not None
    if isinstance(language, Choice):
        return text in language.texts
    found = json.loads(text)
    return (
        set(found) == {"name", "age", "tags"}
        and len(found["name"]) <= 6
        and isinstance(found["age"], int)
        and 0 <= found["age"] <= 120
        and len(found["tags"]) <= 2
        and set(found["tags"]) <= {"a", "b\n", "é"}
    )


@pytest.fixture(scope="module", params=["rwkv7, attention"])
def model(request):
    spec = ModelSpec(layout=request.param, width=32, heads=2)
    made, words = prepare(spec, "bytes", Corpus("c", ("x",)), seed=0)
    with torch.no_grad():
        made.model.backbone.norm.weight.fill_(4.0)
    return made.eval(), words


LANGUAGES = {
    "date": Pattern(r"[0-9]{4}-(0[1-9]|1[0-2])-[0-9]{2}"),
    "open": Pattern(r"(ab|c)+é?"),
    "schema": JsonSchema(SCHEMA),
    "choice": Choice(CHOICES),
}
METHODS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.5, top_k=50, repetition_penalty=1.3),
    Beams(width=3),
    DiverseBeams(groups=2, width=2),
    Contrastive(candidates=3),
)


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_text_is_in_the_language(model, name, method):
    made, words = model
    texts = 1 if isinstance(method, Contrastive) else 4
    options = {"new_tokens": 64, "method": method, "texts": texts, "tokenizer": words}
    found = generate_texts(made, "To be", constraint=LANGUAGES[name], **options)
    ended = [text for text in found if text.is_ended]
    assert ended or name == "open"  # which the model may never want to end
    for text in ended:
        assert holds(LANGUAGES[name], text.text), text.text


def test_probabilities_are_renormalised(model):
    """Among texts of which none begins another, chances are those of the model given the language."""
    made, words = model
    texts, prompt = ["ab", "ac", "b"], "x"
    totals = torch.zeros(len(texts), dtype=torch.float64)
    with torch.no_grad():
        logs = {}
        for before in ("", "a"):
            ids = words(prompt + before, return_tensors="pt")["input_ids"]
            logs[before] = made(ids).logits[0, -1].double().log_softmax(-1)
    first = logs[""][[ord("a"), ord("b")]].log_softmax(0)
    second = logs["a"][[ord("b"), ord("c")]].log_softmax(0)
    totals[:] = torch.stack([first[0] + second[0], first[0] + second[1], first[1]])
    found = generate_texts(
        made,
        prompt,
        texts=300,
        method=Sampling(),
        constraint=Choice(texts),
        new_tokens=4,
        tokenizer=words,
    )
    for text in found:
        assert text.log_probability == pytest.approx(
            float(totals[texts.index(text.text)]), abs=1e-4
        )
    counts = torch.tensor([[each.text for each in found].count(text) for text in texts])
    expected = 300 * totals.exp()
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # 2 degrees of freedom, p = 0.001


def test_a_text_without_room_is_a_beginning(model):
    made, words = model
    (text,) = generate_texts(
        made, "x", constraint=Pattern("[a-z]{8}"), new_tokens=5, tokenizer=words
    )
    assert not text.is_ended
    assert re.fullmatch("[a-z]{5}", text.text)


@pytest.mark.parametrize(
    "language",
    [
        Pattern("(ab"),
        Pattern(r"(a)\1"),
        Pattern(r"a(?!b)"),
        Pattern(r"[^\s\S]"),
        Pattern("a" * 300_000),
        Pattern("(" * 20_000 + "a" + ")" * 20_000),
        JsonSchema({"type": "nope"}),
        JsonSchema({"type": "string", "minLength": 5, "maxLength": 2}),
        JsonSchema({"$ref": "#"}),
        JsonSchema({"$ref": "http://example.com/schema.json"}),
        JsonSchema({"type": {1, 2}}),
        JsonSchema([]),
        Choice([]),
        Choice("yes"),
        Choice(["yes", ""]),
    ],
    ids=lambda language: repr(language)[:40],
)
def test_what_fits_no_text_is_refused(model, language):
    made, words = model
    with pytest.raises(DataError, match=type(language).__name__):
        generate_texts(made, "x", constraint=language, tokenizer=words)


@pytest.mark.parametrize("pattern", ["(((a{1,100}){1,100}){1,100}){1,100}", "(a|aa)+b", ".*" * 40])
def test_a_pattern_that_explodes_costs_little(model, pattern):
    made, words = model
    with contextlib.suppress(DataError):  # at a limit of the automata
        options = {"new_tokens": 20, "tokenizer": words}
        assert len(generate_texts(made, "x", constraint=Pattern(pattern), **options)) == 1


def test_a_tokenizer_must_be_known():
    with pytest.raises(ConfigError, match="fast tokenizer"):
        Choice(["a"]).constraint(type("Slow", (), {})())
