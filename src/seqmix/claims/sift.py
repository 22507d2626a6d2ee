"""Supervised in-context fine-tuning: labels as constrained answers, learnt with demonstrations before them (2025)."""

from __future__ import annotations

import random
import re
import statistics
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.claims._claim import Claim, Finding, Run, compare_groups, overall
from seqmix.claims._finetuning import pretrained, tune
from seqmix.data.mentions import KINDS, MOST, Sentence, f1, read_sentences
from seqmix.data.text import read_text, split_text

INSTRUCTION = (
    "Name every function, method, class, module and exception that the text mentions, in order."
)
LABELS = [None, *KINDS.values()]
INSTRUCTED, BARE = "with instruction", "without instruction"
ENCODER = "decoder as encoder"
WORSE = 0.05  # F1 that leaving out the instruction may cost
CHARACTERS = 60  # of sentences for the random model

Answers = list[list[tuple[str, str]]]


def measure(run: Run) -> list[Finding]:
    found = {
        f"{way}, {name}": run.remember(
            f"{way}, {name}", partial(answered, run, name, way == "SIFT")
        )
        for way in ("ICL", "SIFT")
        for name in (INSTRUCTED, BARE)
    }
    for rate in run["rates of the classifier"]:
        name = f"{ENCODER}, rate {rate:g}"
        found[name] = run.remember(name, partial(classified, run, rate))
    wanted = run.remember("wanted", lambda: [one.mentions() for one in sentences(run)[2]])
    answers = {name: _pairs(each) for name, each in found.items()}
    true = _pairs(wanted)
    scores = {
        name: [f1([a], [b]) for a, b in zip(each, true, strict=True)]
        for name, each in answers.items()
    }
    table = {
        name: {"all mentions": f1(each, true), "mean of sentences": statistics.fmean(scores[name])}
        for name, each in answers.items()
    }
    return [
        better_than_demonstrations(scores, table),
        better_than_classifier(scores, table),
        needs_no_instruction(scores, table),
    ]


def _pairs(answers: Any) -> Answers:
    return [[(label, word) for label, word in each] for each in answers]


# ---- data and prompts


def sentences(run: Run) -> tuple[list[Sentence], list[Sentence], list[Sentence]]:
    """Demonstrations, training sentences, and test sentences of other documents."""
    if run["data"] is None:
        parts = [read_sentences([QUICK])] * 2
    else:
        halves = split_text(read_text(run["data"]))
        parts = [read_sentences(part.documents) for part in halves]
    draw = random.Random(run["seed"])
    train = draw.sample(parts[0], run["demonstrations"] + run["rows"] * run["row"])
    known = {one.text for one in parts[0]}
    fresh = [one for one in parts[1] if one.text not in known] or parts[1]
    return (
        train[: run["demonstrations"]],
        train[run["demonstrations"] :],
        draw.sample(fresh, run["tests"]),
    )


def written(mentions: list[tuple[str, str]]) -> str:
    return "; ".join(f"{label} {word}" for label, word in mentions)


def read(answer: str) -> list[tuple[str, str]]:
    """The mentions of an answer; the constraint has seen to its form, but it may have been cut off."""
    parts = [part.split(" ") for part in answer.removesuffix(";").split("; ")]
    return [(part[0], part[1]) for part in parts if len(part) == 2]


def pattern(sentence: Sentence) -> str:
    """A regular expression of the answers: up to six mentions, each a kind and a word of the sentence."""
    words = "|".join(map(re.escape, sorted(set(sentence.words))))
    one = f"({'|'.join(KINDS.values())}) ({words})"
    return f" {one}(; {one}){{0,{MOST - 1}}}\\n"


def prompt(some: list[Sentence], name: str) -> Any:
    from seqmix.generate.few_shot import FewShot

    return FewShot(
        [(one.text, written(one.mentions())) for one in some],
        target="Mentions:",
        instruction=INSTRUCTION if name == INSTRUCTED else "",
    )


# ---- what is compared


def answered(run: Run, name: str, is_tuned: bool) -> Answers:
    """Mentions by constrained answers, after fine-tuning on answers or with the demonstrations alone."""
    from seqmix.generate import Pattern
    from seqmix.generate.few_shot import answer_texts
    from seqmix.train.parameters import merged, select_parameters

    model, tokenizer = pretrained(run)
    demonstrations, train, tests = sentences(run)
    if is_tuned:
        model = select_parameters(model, "lora", seed=run["seed"])
        rows = [train[start : start + run["row"]] for start in range(0, len(train), run["row"])]
        batches = [prompt(row, name).training_row(tokenizer) for row in rows]
        tune(model, batches, run["rate"])
        model = merged(model)
    answers = answer_texts(
        model.eval(),
        tokenizer,
        prompt(demonstrations, name),
        [one.text for one in tests],
        new_tokens=run["new tokens"],
        constraints=[Pattern(pattern(one)).constraint(tokenizer) for one in tests],
    )
    return [read(answer) for answer in answers]


def classified(run: Run, rate: float) -> Answers:
    """Mentions by a classifier of words on the decoder's features, with a mask that lets all words see each other.

    It learns from the same sentences, in more epochs: with fewer it names nothing, for its last layer is new.
    """
    from seqmix.train.parameters import select_parameters

    model, tokenizer = pretrained(run)
    _, train, tests = sentences(run)
    model = select_parameters(model, "lora", seed=run["seed"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run["seed"])
        model.add_module("words", nn.Linear(model.config.hidden_size, len(LABELS)))
    epochs = run["epochs of the classifier"]
    size = run["row"]
    order = [one for _ in range(epochs) for one in train]
    batches = [
        word_batch(tokenizer, order[start : start + size]) for start in range(0, len(order), size)
    ]

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(word_logits(model, batch), batch["labels"])

    tune(model, batches, rate, loss=loss)
    model.eval()
    found = []
    with torch.no_grad():
        for one in tests:
            chosen = word_logits(model, word_batch(tokenizer, [one])).argmax(-1).tolist()
            labels = tuple(LABELS[place] for place in chosen)
            found.append(Sentence(one.text, one.words, labels).mentions())
    return found


def word_batch(tokenizer: Any, some: list[Sentence]) -> dict[str, Tensor]:
    """Sentences padded behind; for every word the place of the token that ends it, and its label."""
    ids, places, labels = [], [], []
    for row, one in enumerate(some):
        encoded = tokenizer(one.text, return_offsets_mapping=True, add_special_tokens=False)
        ends = [end for _, end in encoded["offset_mapping"]]
        ids.append(encoded["input_ids"])
        behind = 0
        for word, label in zip(one.words, one.labels, strict=True):
            behind = one.text.index(word, behind) + len(word)
            token = next(number for number, end in enumerate(ends) if end >= behind)
            places.append((row, token))
            labels.append(LABELS.index(label))
    lengths = torch.tensor([len(each) for each in ids])
    padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, each in enumerate(ids):
        padded[row, : len(each)] = torch.tensor(each)
    return {
        "input_ids": padded,
        "lengths": lengths,
        "places": torch.tensor(places),
        "labels": torch.tensor(labels),
    }


def word_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits [words, labels] of all words of the batch, in order."""
    ids = batch["input_ids"]
    seen = torch.arange(ids.shape[1]) < batch["lengths"].unsqueeze(1)
    lowest = torch.finfo(model.dtype).min
    mask = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    mask = mask.masked_fill(~seen[:, None, None, :], lowest)
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1)
    rows, tokens = batch["places"].unbind(1)
    logits: Tensor = model.words(output.hidden_states[-1][rows, tokens])
    return logits


# ---- the statements

Scores = dict[str, list[float]]


def gain(scores: Scores, name: str, other: str, margin: float = 0.0) -> Any:
    gains = [a - b for a, b in zip(scores[name], scores[other], strict=True)]
    return compare_groups(gains, [0.0], margin=margin)


def better_than_demonstrations(scores: Scores, table: Any) -> Finding:
    verdicts = [gain(scores, f"SIFT, {name}", f"ICL, {name}") for name in (INSTRUCTED, BARE)]
    return Finding(
        "Fine-tuning with demonstrations labels better than the same demonstrations without fine-tuning.",
        "mean F1 of sentences: higher by two standard errors over sentences, with the instruction and without",
        table,
        overall(verdicts),
    )


def better_than_classifier(scores: Scores, table: Any) -> Finding:
    rates = [name for name in scores if name.startswith(ENCODER)]
    best = max(rates, key=lambda name: statistics.fmean(scores[name]))
    verdicts = [gain(scores, f"SIFT, {name}", best) for name in (INSTRUCTED, BARE)]
    shown = max(statistics.fmean(scores[f"ICL, {name}"]) for name in (INSTRUCTED, BARE))
    has_learnt = statistics.fmean(scores[best]) > shown
    return Finding(
        "Labels as generated answers are better than those of a classifier on the features of the same model, with the "
        "causal mask removed.",
        "mean F1 of sentences: higher by two standard errors over sentences, with the instruction and without, than at "
        "the best of the classifier's rates; inconclusive where the classifier has learnt so little that "
        "demonstrations alone are better",
        table,
        overall(verdicts) if has_learnt else "inconclusive",
    )


def needs_no_instruction(scores: Scores, table: Any) -> Finding:
    return Finding(
        "After fine-tuning with demonstrations the instruction is hardly needed.",
        f"mean F1 of sentences without instruction: not more than {WORSE} lower, two standard errors over sentences "
        "allowed for",
        table,
        gain(scores, f"SIFT, {BARE}", f"SIFT, {INSTRUCTED}", margin=-WORSE),
    )


QUICK = "\n\n".join(
    f"Here :func:`{first}` may raise :exc:`{second}` where it must."
    for first in ("open", "eval", "iter", "next", "len", "abs")
    for second in ("OSError", "KeyError", "EOFError")
)

CLAIM = Claim(
    title="Supervised In-Context Fine-Tuning for Generative Sequence Labeling",
    paper="arXiv:2509.00921",
    claimed="Sequence labelling as constrained generation of the labelled spans, fine-tuned on answers with "
    "demonstrations in the context, exceeds demonstrations alone and a token classifier on the same decoder without "
    "its causal mask; the instruction can be left out. Here: a model of 135 M parameters, adapted by LoRA on a "
    "hundred sentences of the Python documentation whose mentions of functions, methods, classes, modules and "
    "exceptions its authors have marked, where the paper takes models of 1 to 8 B and standard corpora.",
    where="abstract; the tables that compare ICL, SIFT and decoder-as-encoder; the study of instructions",
    measure=measure,
    quick={
        "model": None,
        "data": None,
        "seed": 0,
        "demonstrations": 1,
        "rows": 2,
        "row": 2,
        "tests": 3,
        "rate": 1e-3,
        "rates of the classifier": [1e-3],
        "epochs of the classifier": 1,
        "new tokens": 16,
    },
    full={
        "model": "smollm2-135m",
        "data": "python_docs",
        "seed": 0,
        "demonstrations": 4,
        "rows": 20,
        "row": 5,
        "tests": 60,
        "rate": 1e-3,
        "rates of the classifier": [3e-3],
        "epochs of the classifier": 8,
        "new tokens": 48,
    },
)
