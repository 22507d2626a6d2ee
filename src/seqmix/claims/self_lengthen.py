"""A model learns to write longer texts from its own texts, made longer by itself (Quan et al. 2024)."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F

from seqmix.claims._claim import Claim, Finding, Run, Verdict
from seqmix.claims._finetuning import pretrained
from seqmix.data.diversity import repeated_ngrams

LONGER = 1.2  # times as long after the last round as before the first
LESS_LIKELY = 1.1  # times the perplexity, at most
MORE_REPEATED = 0.05  # share of 4-grams, at most
USER, MODEL, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
ORDER = "Rewrite the answer so that it is longer, with more details and examples.\n"
# Asked for longer texts without an example, a small model copies the short ones.
EXAMPLE = (
    "Question: What is tea?\nAnswer: Tea is a drink made from leaves.",
    "Tea is a drink that is made by pouring hot water over the dried leaves of the tea plant. People first drank it "
    "in China, thousands of years ago, and today it is drunk almost everywhere. There are many kinds. Green tea is "
    "made of leaves that are dried soon after they are picked, so it tastes fresh. For black tea the leaves rest in "
    "the air for hours, which makes them dark and strong. Many people drink it in the morning with milk or sugar, "
    "because it wakes them up. Others prefer it with lemon, or cold on a hot day. In some countries making tea for a "
    "guest is a sign of respect.",
)
QUESTION = f"{USER}{{instruction}}{END}{MODEL}"
EXTENSION = (
    f"{USER}{ORDER}{EXAMPLE[0]}{END}{MODEL}{EXAMPLE[1]}{END}"
    f"{USER}{ORDER}Question: {{instruction}}\nAnswer: {{text}}{END}{MODEL}"
)
INSTRUCTIONS = (
    "What is a lighthouse?",
    "Why do birds migrate?",
    "What does a baker do?",
    "How does a bicycle work?",
    "What is a volcano?",
    "Why is sleep important?",
    "What is a library for?",
    "How is bread made?",
)
NEW = (
    "What is a museum?",
    "Why do leaves fall in autumn?",
    "What does a gardener do?",
    "How does a kite fly?",
    "What is a river?",
    "Why is exercise healthy?",
    "What is a bridge for?",
    "How is paper made?",
)


def rounds(run: Run) -> dict[str, Any]:
    """What the generator writes for new instructions at first and after every round, and what the rounds accept."""
    from seqmix.train.self_lengthen import Roles, Writer, learn, lengthen

    roles = Roles(question=QUESTION, extension=EXTENSION)
    original, tokenizer = pretrained(run)
    generator, extender = (
        Writer(model=copy.deepcopy(original), tokenizer=tokenizer, new_tokens=run["new tokens"])
        for _ in range(2)
    )
    described = [describe(run, original, generator)]
    made = []
    for number in range(run["rounds"]):
        texts = lengthen(
            generator,
            extender,
            roles,
            INSTRUCTIONS[: run["instructions"]],
            attempts=run["attempts"],
            seed=100 * number,
        )
        made.append({"short": texts.short, "long": texts.long})
        if not texts.accepted():
            break
        generator, extender = learn(generator, extender, roles, texts, **run["training"])
        described.append(describe(run, original, generator))
    return {"by round": described, "made": made}


def describe(run: Run, original: Any, generator: Any) -> dict[str, Any]:
    """Length, perplexity under the original model and repetition of the texts for new instructions."""
    prompts = [QUESTION.replace("{instruction}", one) for one in NEW[: run["tests"]]]
    texts = generator.write(prompts, seed=7)
    tokenizer, nats, tokens, repeated = generator.tokenizer, 0.0, [], []
    for prompt, text in zip(prompts, texts, strict=True):
        known, said = (tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, text))
        tokens.append(len(said))
        repeated.append(repeated_ngrams(said, 4))
        if said:
            with torch.no_grad():
                logits = original(input_ids=torch.tensor([known + said])).logits[0]
            scored = logits[len(known) - 1 : -1]
            nats += float(F.cross_entropy(scored.float(), torch.tensor(said), reduction="sum"))
    return {
        "tokens": tokens,
        "perplexity": math.exp(nats / max(1, sum(tokens))),
        "repeated 4-grams": repeated,
        "cut off": sum(count >= run["new tokens"] - 1 for count in tokens),
        "first text": texts[0],
    }


def measure(run: Run) -> list[Finding]:
    found = run.remember("rounds", lambda: rounds(run))
    by_round = found["by round"]
    lengths = [statistics.fmean(one["tokens"]) for one in by_round]
    repeated = [statistics.fmean(one["repeated 4-grams"]) for one in by_round]
    perplexity = [one["perplexity"] for one in by_round]
    finished = len(by_round) == run["rounds"] + 1
    growing = all(later > earlier for earlier, later in itertools.pairwise(lengths))

    def verdict(holds: bool) -> Verdict:
        return "reproduced" if finished and holds else "not reproduced"

    return [
        Finding(
            "The texts get longer with every round.",
            f"mean length for new instructions: more after each of {run['rounds']} rounds than before it, and at last "
            f"at least {LONGER} times as much as at first",
            {
                "mean tokens": lengths,
                "tokens": [one["tokens"] for one in by_round],
                "cut off": [one["cut off"] for one in by_round],
                "accepted": [
                    sum(text is not None for text in one["long"]) for one in found["made"]
                ],
                "words of short and long texts": [words(one) for one in found["made"]],
                "first text, by round": [one["first text"] for one in by_round],
            },
            verdict(growing and lengths[-1] >= LONGER * lengths[0]),
        ),
        Finding(
            "They stay as likely to the original model.",
            f"their perplexity at last at most {LESS_LIKELY} times that at first",
            {"perplexity": perplexity},
            verdict(perplexity[-1] <= LESS_LIKELY * perplexity[0]),
        ),
        Finding(
            "They do not repeat themselves more.",
            f"share of repeated 4-grams at last at most {MORE_REPEATED} above that at first",
            {"repeated 4-grams": repeated},
            verdict(repeated[-1] <= repeated[0] + MORE_REPEATED),
        ),
    ]


def words(made: dict[str, Any]) -> list[float]:
    """Mean words of the short texts that an extension was accepted for, and of these extensions."""
    pairs = [(s, t) for s, t in zip(made["short"], made["long"], strict=True) if t is not None]
    if not pairs:
        return []
    return [
        statistics.fmean(len(text.split()) for text in side) for side in zip(*pairs, strict=True)
    ]


CLAIM = Claim(
    title="Language Models can Self-Lengthen to Generate Long Texts",
    paper="arXiv:2410.23933",
    claimed="A Generator and an Extender, both the model itself, make and learn longer texts in rounds, without other "
    "data or models; lengths grow with every round at held quality. Here: answers of a 135M model to eight short "
    "questions, a hundred words where the paper reaches thousands, sentences where it has paragraphs, LoRA of rank 8, "
    "and perplexity and repetition in place of a judge.",
    where="section 3 and the table of lengths and quality by iteration",
    measure=measure,
    quick={
        "model": None,
        "instructions": 2,
        "tests": 2,
        "new tokens": 8,
        "rounds": 1,
        "attempts": 1,
        "training": {"epochs": 1, "learning_rate": 1e-3},
    },
    full={
        "model": "smollm2-135m",
        "instructions": 6,
        "tests": 8,
        "new tokens": 288,
        "rounds": 2,
        "attempts": 2,
        "training": {"epochs": 2, "learning_rate": 5e-4},
    },
)
