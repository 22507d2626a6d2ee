"""Self-lengthening: what is asked, what is accepted, and that both roles learn from what was made."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from seqmix.core.errors import ConfigError, DataError
from seqmix.data.text import Corpus
from seqmix.models.hf import create
from seqmix.train import self_lengthen
from seqmix.train.language import prepare
from seqmix.train.self_lengthen import (
    Roles,
    Round,
    Writer,
    extend,
    learn,
    lengthen,
    sentences,
    why_rejected,
)

ROLES = Roles(question="Q {instruction} A ", extension="Q {instruction} S {text} L ")
LONG = "It is a tall tower. At night its lamp shows ships the way."


def writer(new_tokens: int = 6) -> Writer:
    torch.manual_seed(0)
    small = create("2x[attention]", width=16, heads=2, vocabulary=258, eos_token_id=256)
    model, tokenizer = prepare(small, "bytes", Corpus("none", ("none",)), seed=0)
    return Writer(model=model, tokenizer=tokenizer, new_tokens=new_tokens)


def loss(given: Writer, prompt: str, answer: str) -> float:
    known, said = (given.tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, answer))
    with torch.no_grad():
        logits = given.model(input_ids=torch.tensor([known + said])).logits[0]
    return float(F.cross_entropy(logits[len(known) - 1 : -1], torch.tensor(said)))


class Script:
    """In place of a writer: says what it is told, and remembers what it was asked."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), []

    def write(self, prompts: list[str], *, seed: int) -> list[str]:
        self.asked.append(list(prompts))
        return self.answers.pop(0)


def test_the_second_stage_sees_the_whole_text_and_goes_on_from_two_thirds_of_the_first():
    script = Script(["One. Two. Three."], ["Four."])
    assert extend(script, ROLES, ["why"], ["A b. C d."], seed=0) == ["One. Two. Four."]
    assert script.asked == [["Q why S A b. L "], ["Q why S A b. C d. L One. Two."]]


def test_a_text_that_was_rejected_is_tried_again_and_an_accepted_one_is_not():
    extender = Script(["", ""], [LONG, "no"], [""], ["Not at its end but longer"])
    made = lengthen(Script(["A tower.", "A bird."]), extender, ROLES, ["a", "b"], attempts=2)
    assert made == Round(("a", "b"), ("A tower.", "A bird."), (LONG, None))
    assert [len(asked) for asked in extender.asked] == [2, 2, 1, 1]
    assert made.accepted() == [("a", "A tower.", LONG)]


def test_what_is_rejected():
    assert why_rejected("A tower.", LONG) is None
    assert why_rejected(LONG, LONG) == "not longer"
    assert why_rejected("A tower.", LONG + " And") == "not at its end"
    assert why_rejected("A tower.", f"{LONG} {LONG} {LONG}") == "repeats itself"
    assert sentences(" It is. Is it?\nYes! 3.5 ") == ["It is.", "Is it?", "Yes!", "3.5"]


def test_texts_of_a_batch_are_those_written_alone():
    likeliest = dataclasses.replace(writer(), top_p=1e-6)
    prompts = ["a", "a longer prompt", "and"]
    together = likeliest.write(prompts, seed=0)
    assert together == [likeliest.write([prompt], seed=1)[0] for prompt in prompts]


def test_both_roles_learn_the_long_text_and_nothing_else_changes():
    generator, extender = writer(), writer()
    before = copy.deepcopy(generator.model)
    made = Round(("a", "b"), ("A tower.", "A bird."), (LONG, None))
    taught = learn(generator, extender, ROLES, made, epochs=40, learning_rate=2e-2)
    for after, prompt in zip(taught, ("Q a A ", "Q a S A tower. L "), strict=True):
        assert loss(after, prompt, LONG) < loss(writer(), prompt, LONG) - 0.1
        assert type(after.model) is type(before)
    assert taught[0].new_tokens == generator.new_tokens


def test_an_answer_and_its_end_are_scored_and_its_prompt_is_not():
    given = writer()
    example = self_lengthen._example(given, "ask", "say")
    assert example["input_ids"].tolist() == [[*b"ask", *b"say", given.end]]
    assert example["labels"].tolist() == [[-100] * 3 + [*b"say", given.end]]


def test_errors():
    with pytest.raises(DataError, match="no long text"):
        learn(writer(), writer(), ROLES, Round(("a",), ("A.",), (None,)), epochs=1, learning_rate=1)
    with pytest.raises(ConfigError, match="extension"):
        Roles(question="{instruction}", extension="{instruction}")
    with pytest.raises(ConfigError, match="question"):
        Roles(question="{instruction} {text}", extension="{instruction} {text}")
