"""Few-shot prompting, and the labelled and translated sentences that it is used on."""

import struct

import pytest
import torch

from seqmix.core.errors import DataError
from seqmix.data.mentions import f1, read_sentences
from seqmix.data.packing import IGNORED
from seqmix.data.text import Corpus
from seqmix.data.translations import chrf, read_messages
from seqmix.generate import Beams, Constraint, FewShot, answer_texts
from seqmix.generate.few_shot import nearest
from seqmix.models.backbone import ModelSpec
from seqmix.train.language import prepare

LAYOUTS = ["2x[attention]", "mamba2, attention"]
PAIRS = [("one two", "a b"), ("three", "c")]


@pytest.fixture(scope="module", params=LAYOUTS)
def model_and_tokenizer(request):
    spec = ModelSpec(layout=request.param, width=16, heads=2)
    return prepare(spec, "bytes", Corpus("none", ("none",)), seed=0)


# ---- prompts


def test_the_prompt_as_text():
    prompt = FewShot(PAIRS, source="In:", target="Out:", instruction="Do.")
    assert prompt.before() == "Do.\n\nIn: one two\nOut: a b\n\nIn: three\nOut: c\n\n"
    assert prompt.query("four") == "In: four\nOut:"
    assert FewShot().before() == ""


@pytest.mark.parametrize("wrong", ["", "two\nlines"])
def test_parts_are_one_line(wrong):
    with pytest.raises(DataError, match="one line"):
        FewShot([("text", wrong)])


@pytest.mark.parametrize("shown", [[], PAIRS])
def test_answers_are_those_to_whole_prompts_one_by_one(model_and_tokenizer, shown):
    model, tokenizer = model_and_tokenizer
    prompt = FewShot(shown)
    texts = ["ab", "xy", "longer", "cd"]
    answers = answer_texts(model, tokenizer, prompt, texts, new_tokens=6)
    for text, answer in zip(texts, answers, strict=True):
        ids = tokenizer(prompt.before() + prompt.query(text), return_tensors="pt").input_ids
        (alone,) = Beams(width=1).run(
            model, ids, new_tokens=6, stop=lambda ids: "\n" in tokenizer.decode(ids[-1:])
        )
        assert answer == tokenizer.decode(alone.ids).split("\n")[0].strip()


class Only(Constraint):
    """One text, byte for byte."""

    def __init__(self, text):
        self.text = text.encode()

    def allowed(self, ids, vocabulary, ends):
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        mask[self.text[len(ids)]] = True
        return mask

    def is_over(self, ids):
        return len(ids) == len(self.text)


def test_every_text_has_its_own_constraint(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    wanted = ["yes", "no", "perhaps"]
    answers = answer_texts(
        model,
        tokenizer,
        FewShot(PAIRS),
        ["aa", "bb", "cc"],
        new_tokens=9,
        constraints=[Only(f" {text}\n") for text in wanted],
    )
    assert answers == wanted


def test_a_training_row_learns_answers_alone(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    prompt = FewShot(PAIRS, instruction="Do.")
    row = prompt.training_row(tokenizer)
    ids, labels = row["input_ids"][0], row["labels"][0]
    assert tokenizer.decode(ids) == prompt.before()
    learnt = labels != IGNORED
    assert torch.equal(ids[learnt], labels[learnt])
    assert tokenizer.decode(labels[learnt]) == " a b\n c\n"


def test_the_nearest_demonstrations_come_last():
    pool = [("a red car", "1"), ("the blue house", "2"), ("a red cart", "3"), ("xyz", "4")]
    assert nearest(pool, "A red car", 2) == [pool[2], pool[0]]
    assert nearest(pool, "", 0) == []
    assert sorted(nearest(pool, "?", 9)) == sorted(pool)


# ---- sentences with mentions


def test_marks_become_labels():
    document = """
Title
=====

The :func:`open` function of :mod:`io` may *raise* an :exc:`OSError`.  Nothing is named here at all.

.. function:: open(file)

   A :class:`~email.message.Message` or an ``other`` :attr:`value` has :meth:`!get` too.

Code that is not a sentence with :func:`print` ends here::

This one is :func:`some title <open>` so it is left out of it.
"""
    first, second = read_sentences([document, document])
    assert first.text == "The open function of io may raise an OSError."
    assert first.mentions() == [("function", "open"), ("module", "io"), ("exception", "OSError")]
    assert len(first.words) == len(first.labels) == 10
    assert second.mentions() == [("class", "Message"), ("method", "get")]
    with pytest.raises(DataError, match="no sentence"):
        read_sentences(["plain"])


def test_f1_counts_mentions_with_their_labels():
    a, b = ("class", "x"), ("module", "x")
    assert f1([[a, b]], [[b, a]]) == 1.0
    assert f1([[a, a], [b]], [[a], [a]]) == pytest.approx(2 * 1 / 5)
    assert f1([[]], [[]]) == 1.0
    assert f1([[], [a]], [[a], []]) == 0.0  # in another sentence


# ---- messages and their translations


def catalogue(pairs):
    sides = [[one.encode() for one in side] for side in zip(*pairs, strict=True)]
    start = 28 + 16 * len(pairs)
    tables, texts = b"", b""
    for side in sides:
        for text in side:
            tables += struct.pack("<2I", len(text), start + len(texts))
            texts += text + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return head + tables + texts


def test_messages_are_read_without_contexts_and_plurals(tmp_path):
    folder = tmp_path / "app/locale/fr/LC_MESSAGES"
    folder.mkdir(parents=True)
    known = [("", "head"), ("No", "Non"), ("Yes", "Oui"), ("a\4May", "mai"), ("x\0xs", "x\0x")]
    (folder / "django.mo").write_bytes(catalogue(known))
    assert read_messages("fr", tmp_path) == {"No": "Non", "Yes": "Oui"}
    with pytest.raises(DataError, match="language='xx'"):
        read_messages("xx", tmp_path)
    (folder / "django.mo").write_bytes(b"x" * 40)
    with pytest.raises(DataError, match="no catalogue"):
        read_messages("fr", tmp_path)


@pytest.mark.parametrize(
    ("found", "wanted", "score"),  # as sacrebleu 2.6.0 gives them
    [
        (["The cat sat on the mat."], ["A cat is on the mat."], 56.52510327349417),
        (["Enter a valid number"], ["Enter a valid integer."], 55.89017451692935),
        (["ab"], ["ab cd"], 47.169811320754704),
        (["The cat sat on the mat.", "ab"], ["A cat is on the mat.", "ab cd"], None),
        ([""], ["xyz"], 0.0),
        (["same words"], ["same  words"], 100.0),
    ],
)
def test_chrf_is_that_of_sacrebleu(found, wanted, score):
    if score is None:
        both = chrf(found, wanted)
        assert chrf(found[1:], wanted[1:]) < both < chrf(found[:1], wanted[:1])
    else:
        assert chrf(found, wanted) == pytest.approx(score, abs=1e-6)
