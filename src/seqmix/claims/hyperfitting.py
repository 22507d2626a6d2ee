"""Hyperfitting: a pretrained model that knows a few samples by heart repeats itself less (Carlsson et al. 2024)."""

from __future__ import annotations

import statistics
from typing import Any

from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._finetuning import greedy, predictions, pretrained, windows
from seqmix.claims._training import QUICK_TEXT
from seqmix.data.diversity import repeated_ngrams, type_token_ratio
from seqmix.data.text import read_text, split_text

NEAR_ZERO = 0.1  # nats per token of the samples
LARGEST_ENTROPY_SHARE = 0.5  # of the original model's entropy
QUOTED = 8  # tokens in a row that stand in a sample: quoted from it
LARGEST_QUOTED_SHARE = 0.1
TTR_WINDOW = 96  # last tokens of a continuation, as in the authors' code


def measure(run: Run) -> list[Finding]:
    before = run.remember("original", lambda: original(run))
    after = run.remember("hyperfitted", lambda: hyperfitted(run))
    return [
        worse_on_new_text(before, after),
        less_repetition(before, after),
        sharper(before, after),
        not_quoted(after),
    ]


def texts(run: Run, tokenizer: Any) -> dict[str, Any]:
    """Samples to learn by heart, held-out windows and held-out prompts."""
    training, held_out = (part.documents for part in split_text(read_text(run["data"])))
    new = "\n".join(held_out)
    return {
        "samples": windows(tokenizer, "\n".join(training), run["samples"], run["length"]),
        "validation": windows(tokenizer, new, *run["validation"]),
        "prompts": windows(tokenizer, new, *run["prompts"]),
    }


def original(run: Run) -> dict[str, Any]:
    model, tokenizer = pretrained(run)
    return describe(run, model, tokenizer, texts(run, tokenizer))


def hyperfitted(run: Run) -> dict[str, Any]:
    from seqmix.train.hyperfit import hyperfit

    model, tokenizer = pretrained(run)
    given = texts(run, tokenizer)
    record = hyperfit(
        model, given["samples"], stop_at=NEAR_ZERO / 2, progress=False, **run["training"]
    )
    return describe(run, model, tokenizer, given) | {
        "steps": record.steps,
        "training loss by step": [entry["loss"] for entry in record.history],
    }


def describe(run: Run, model: Any, tokenizer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Losses, entropy and, for each prompt, how varied its greedy continuation is."""
    loss, entropy = predictions(model, given["validation"])
    continuations = greedy(model, given["prompts"], run["new tokens"])
    known = {
        tuple(row[i : i + QUOTED])
        for row in given["samples"].tolist()
        for i in range(len(row) - QUOTED + 1)
    }
    quoted = [
        statistics.fmean(tuple(row[i : i + QUOTED]) in known for i in range(len(row) - QUOTED + 1))
        for row in continuations
    ]
    return {
        "loss on samples": predictions(model, given["samples"])[0],
        "loss on new text": loss,
        "entropy": entropy,
        "type-token ratio": [type_token_ratio(row, window=TTR_WINDOW) for row in continuations],
        "repeated 4-grams": [repeated_ngrams(row, 4) for row in continuations],
        "quoted": quoted,
        "first continuation": tokenizer.decode(continuations[0]),
    }


def worse_on_new_text(before: dict[str, Any], after: dict[str, Any]) -> Finding:
    known, worse = (
        after["loss on samples"] <= NEAR_ZERO,
        after["loss on new text"] > before["loss on new text"],
    )
    return Finding(
        "The model reaches a training loss near zero, and predicts new text worse than before.",
        f"loss on the samples at most {NEAR_ZERO} nats per token, on new text higher than the original's",
        {
            "loss on samples, before and after": [
                before["loss on samples"],
                after["loss on samples"],
            ],
            "loss on new text, before and after": [
                before["loss on new text"],
                after["loss on new text"],
            ],
            "steps": after["steps"],
            "training loss by step": after["training loss by step"],
        },
        "reproduced" if known and worse else "not reproduced" if known else "inconclusive",
    )


def less_repetition(before: dict[str, Any], after: dict[str, Any]) -> Finding:
    varied = compare_groups(after["type-token ratio"], before["type-token ratio"])
    repeated = compare_groups(before["repeated 4-grams"], after["repeated 4-grams"])
    verdicts = {varied, repeated}
    return Finding(
        "Greedy continuations of new text repeat themselves less and use more distinct tokens.",
        "mean over prompts: a higher type-token ratio of the last "
        f"{TTR_WINDOW} tokens and fewer repeated 4-grams, both beyond two standard errors",
        {
            name: {"before": statistics.fmean(before[name]), "after": statistics.fmean(after[name])}
            | {"by prompt, before": before[name], "by prompt, after": after[name]}
            for name in ("type-token ratio", "repeated 4-grams")
        }
        | {
            "first continuation": {
                "before": before["first continuation"],
                "after": after["first continuation"],
            }
        },
        verdicts.pop() if len(verdicts) == 1 else "inconclusive",
    )


def sharper(before: dict[str, Any], after: dict[str, Any]) -> Finding:
    share = after["entropy"] / before["entropy"]
    return Finding(
        "Predictions on new text lose most of their entropy.",
        f"mean entropy of the next token at most {LARGEST_ENTROPY_SHARE} of the original's",
        {"nats, before and after": [before["entropy"], after["entropy"]], "share": share},
        "reproduced" if share <= LARGEST_ENTROPY_SHARE else "not reproduced",
    )


def not_quoted(after: dict[str, Any]) -> Finding:
    share = statistics.fmean(after["quoted"])
    return Finding(
        "The continuations are rarely quotations of the samples.",
        f"of runs of {QUOTED} tokens at most {LARGEST_QUOTED_SHARE:.0%} stand in a sample, on average over prompts",
        {"share": share, "by prompt": after["quoted"]},
        "reproduced" if share <= LARGEST_QUOTED_SHARE else "not reproduced",
    )


CLAIM = Claim(
    title="The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation",
    paper="arXiv:2412.04318",
    claimed="A pretrained language model trained to a near-zero loss on a few samples predicts new text worse, with "
    "collapsed entropy, and yet its greedy continuations are more varied and repeat themselves less, without quoting "
    "the samples.",
    where="abstract; Sections 3 and 4 (type-token ratio, entropy, loss)",
    measure=measure,
    quick={
        "model": None,
        "data": QUICK_TEXT,
        "samples": 4,
        "length": 24,
        "validation": [2, 32],
        "prompts": [2, 8],
        "new tokens": 24,
        "training": {"epochs": 20, "batch": 2, "learning_rate": 1e-2},
    },
    # The paper: 2,000 samples of 256 tokens and 20 epochs at rate 1e-6, models of 1.1B parameters and more.
    full={
        "model": "smollm2-135m",
        "data": "shakespeare",
        "samples": 8,
        "length": 96,
        "validation": [8, 192],
        "prompts": [8, 32],
        "new tokens": 128,
        "training": {"epochs": 14, "batch": 4, "learning_rate": 2e-4},
    },
)
