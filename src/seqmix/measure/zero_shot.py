"""A zero-shot set that needs no download: the likelier of several endings is the model's answer.

    grammar        two forms of a verb, a pronoun or a noun, one of which agrees; made from templates (chance 1/2)
    facts          common knowledge that this file lists, among endings of the same kind (chance 1/4)
    continuation   how a passage of the given text goes on, among other places of the same text (chance 1/4)

An ending's score is its log-likelihood per token after the context. Scores of one model mean little; those of a
model and of what was made of it compare.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHOICES = 4
CONTEXT, ENDING = 160, 80  # characters of a passage and of how it goes on


@dataclass(frozen=True)
class Question:
    """A context and possible endings, of which `answer` is the place of the right one."""

    kind: str
    context: str
    endings: Sequence[str]
    answer: int

    @property
    def chance(self) -> float:
        return 1 / len(self.endings)


@torch.no_grad()
def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    *,
    questions: int = 24,
    seed: int = 0,
) -> dict[str, float]:
    """The share of right answers of each kind, `questions` of each at most, and `mean`, the mean over the kinds.

    `text` gives the passages of `continuation`, which is left out without it.
    """
    model.eval()
    asked = [*grammar(questions, seed), *facts(questions, seed)]
    if text is not None:
        asked += continuation(text, questions, seed)
    right: dict[str, list[bool]] = {}
    for question in asked:
        likely = log_likelihoods(model, tokenizer, question.context, question.endings)
        right.setdefault(question.kind, []).append(int(likely.argmax()) == question.answer)
    shares = {kind: sum(answers) / len(answers) for kind, answers in right.items()}
    return {**shares, "mean": sum(shares.values()) / len(shares)}


def log_likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, context: str, endings: Sequence[str]
) -> Tensor:
    """Mean log-likelihood, in nats per token, of each ending after `context`, [endings]."""
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    texts = [tokenizer(context + e, add_special_tokens=False)["input_ids"] for e in endings]
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask, ending = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
        # A token may hold the end of the context and the beginning of the ending: it belongs to the ending.
        same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), None)
        start = len(before) if same is None else same
        ending[row, max(1, min(start, len(text) - 1)) : len(text)] = True
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    likely = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()
    counted = ending[:, 1:]
    return (likely * counted).sum(1) / counted.sum(1)


NOUNS = ("key", "boy", "teacher", "car", "dog", "letter", "farmer", "window")
PLACES = ("near the cabinets", "behind the houses", "beside the trees", "with the red doors")
PEOPLE = (("the woman", "herself"), ("the man", "himself"), ("the girls", "themselves"))


def grammar(count: int, seed: int) -> list[Question]:
    """Agreement of verbs across another noun, of reflexive pronouns, and of nouns with their determiners."""
    made = []
    for noun, place in itertools.product(NOUNS, PLACES):
        made += [
            Question("grammar", f"The {noun} {place}", (" is", " are"), 0),
            Question("grammar", f"The {noun}s {place.removesuffix('s')}", (" is", " are"), 1),
        ]
    for (person, own), verb in itertools.product(PEOPLE, ("hurt", "saw", "blamed", "washed")):
        others = [pronoun for _, pronoun in PEOPLE if pronoun != own]
        made.append(
            Question("grammar", f"Yesterday {person} {verb}", (f" {own}", f" {others[0]}"), 0)
        )
    for noun in NOUNS:
        made += [
            Question("grammar", "I have never seen these", (f" {noun}s", f" {noun}"), 0),
            Question("grammar", "I have never seen this", (f" {noun}s", f" {noun}"), 1),
        ]
    return random.Random(seed).sample(made, min(count, len(made)))


FACTS = {
    "The capital of {} is the city of": {
        "France": "Paris",
        "Italy": "Rome",
        "Japan": "Tokyo",
        "Germany": "Berlin",
        "Spain": "Madrid",
        "Russia": "Moscow",
        "Egypt": "Cairo",
        "England": "London",
    },
    "The opposite of {} is": {
        "hot": "cold",
        "up": "down",
        "big": "small",
        "early": "late",
        "rich": "poor",
        "light": "dark",
        "happy": "sad",
        "old": "young",
    },
    "A young {} is called a": {
        "dog": "puppy",
        "cat": "kitten",
        "cow": "calf",
        "sheep": "lamb",
        "horse": "foal",
        "bear": "cub",
    },
    "The colour of {} is": {
        "grass": "green",
        "snow": "white",
        "blood": "red",
        "coal": "black",
        "a ripe banana": "yellow",
        "a clear sky": "blue",
    },
    "People use their {} to": {
        "eyes": "see",
        "ears": "hear",
        "nose": "smell",
        "legs": "walk",
        "teeth": "bite",
        "brain": "think",
    },
}


def facts(count: int, seed: int) -> list[Question]:
    """Every fact of the list, among three other answers to the same kind of question."""
    chooser = random.Random(seed)
    made = []
    for template, pairs in FACTS.items():
        for subject, answer in pairs.items():
            others = chooser.sample([x for x in pairs.values() if x != answer], CHOICES - 1)
            place = chooser.randrange(CHOICES)
            endings = [f" {other}" for other in others]
            endings.insert(place, f" {answer}")
            made.append(Question("facts", template.format(subject), tuple(endings), place))
    return chooser.sample(made, min(count, len(made)))


def continuation(text: str, count: int, seed: int) -> list[Question]:
    """Passages of `text`; raises `DataError` where it is too short for different ones."""
    chooser = random.Random(seed)
    starts = [i for i, letter in enumerate(text) if letter == " "]
    starts = [i for i in starts if CONTEXT <= i <= len(text) - ENDING]
    if len(starts) < CHOICES * count:
        raise DataError(
            f"The text has {len(text)} characters, too few for {count} passages with {CHOICES} endings each. "
            "Give a longer text."
        )
    made = []
    for _ in range(count):
        places = chooser.sample(starts, CHOICES)
        answer = chooser.randrange(CHOICES)
        made.append(
            Question(
                "continuation",
                text[places[answer] - CONTEXT : places[answer]],
                tuple(text[place : place + ENDING] for place in places),
                answer,
            )
        )
    return made
