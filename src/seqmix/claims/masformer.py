"""MASFormer: full attention in the bottom layers, windows in the others (Zhang et al. 2023)."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._claim import Claim, Finding, Run, compare_groups, overall
from seqmix.claims._training import (
    QUICK_TEXT,
    accuracy_after_training,
    loss_after_training,
    specify,
)
from seqmix.mixers import Mixer
from seqmix.models.backbone import Backbone
from seqmix.ops import OPERATORS
from seqmix.ops.attention import attention
from seqmix.tasks import TASKS

STACKS = ("full", "mixed", "windowed")
LARGEST_SHARE = 0.4  # of the work of full attention
LARGEST_LOSS_RATIO = 1.02
NEAR, FAR_BELOW = 0.05, 0.3  # accuracy lost by mixed spans at most, and by windows alone at least


def measure(run: Run) -> list[Finding]:
    return [
        work_is_cut(run),
        attention_is_faster(run),
        loss_stays(run),
        windows_lose_recall(run),
        long_text_helps(run),
    ]


def stacks(window: int, depth: int) -> dict[str, str]:
    """Full attention in every layer, in the bottom layer alone, and in none."""
    windowed = f"windowed_attention(window={window})"
    return {
        "full": f"{depth}x[attention]",
        "mixed": f"attention, {depth - 1}x[{windowed}]",
        "windowed": f"{depth}x[{windowed}]",
    }


def mixers(layout: str, settings: Any) -> list[Mixer]:
    return [block.mixer for block in Backbone(specify(layout, settings)[0]).blocks]


def work(layout: str, settings: Any, length: int) -> float:
    """Operations of the attention operators over `length` tokens, as their cost model predicts them."""
    cases = [mixer.operator_case(length, 0) for mixer in mixers(layout, settings)]
    return sum(OPERATORS.get("attention").cost(case).flops for case in cases)


def work_is_cut(run: Run) -> Finding:
    settings, depth = run["text training"], run["depth"]
    layouts = stacks(run["text window"], depth)
    shares = {
        name: {
            str(length): work(layouts[name], settings, length)
            / work(layouts["full"], settings, length)
            for length in run["lengths"]
        }
        for name in STACKS
    }
    share = shares["mixed"][str(settings["length"])]
    return Finding(
        "Mixed spans cut the work of attention (the paper: by up to 75 %).",
        f"predicted operations at the training length, {settings['length']}, at most {LARGEST_SHARE} times "
        f"those of full attention; with one full layer in {depth} the limit for long texts is {1 / depth:g}",
        {"share of full attention's work by length": shares, "window": run["text window"]},
        "reproduced" if share <= LARGEST_SHARE else "not reproduced",
    )


def attention_is_faster(run: Run) -> Finding:
    """Median time of forward and backward of a stack's operators, the stacks in turn."""
    settings = run["text training"]
    layouts = stacks(run["text window"], run["depth"])
    windows = {name: [m.config.window for m in mixers(layouts[name], settings)] for name in STACKS}
    heads, width = settings["heads"], settings["width"] // settings["heads"]

    def step(inputs: list[Tensor], layers: list[int | None]) -> float:
        start = time.perf_counter()
        for window in layers:
            attention(*inputs, window=window).sum().backward()
        return (time.perf_counter() - start) * 1e3

    def milliseconds(length: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(length)
        inputs = [
            torch.randn(1, length, heads, width, generator=generator).requires_grad_()
            for _ in range(3)
        ]
        samples: dict[str, list[float]] = {name: [] for name in STACKS}
        for repeat in range(run["repeats"] + 1):
            for name in STACKS:
                elapsed = step(inputs, windows[name])
                if repeat:  # the first call warms up
                    samples[name].append(elapsed)
        return {name: statistics.median(times) for name, times in samples.items()}

    table = {
        str(length): run.remember(
            f"milliseconds at length {length}", lambda n=length: milliseconds(n)
        )
        for length in run["lengths"]
    }
    shares = {length: row["mixed"] / row["full"] for length, row in table.items()}
    longest = str(max(run["lengths"]))
    return Finding(
        "The cut in work is one in time.",
        "forward and backward of the attention operators take at most half the time of full attention at the "
        "longest length measured",
        {"mixed to full time by length": shares, "median milliseconds by length": table},
        "reproduced" if shares[longest] <= 0.5 else "not reproduced",
    )


def loss_stays(run: Run) -> Finding:
    layouts = stacks(run["text window"], run["depth"])
    losses = {
        name: [
            loss_after_training(
                run,
                layouts[name],
                run["data"],
                run["text training"],
                seed=seed,
                name=f"text, {name}",
            )
            for seed in range(run["seeds"])
        ]
        for name in STACKS
    }
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    ratios = {name: mean / means["full"] for name, mean in means.items()}
    return Finding(
        "Language modelling with mixed spans is competitive with full attention.",
        f"held-out loss of mixed spans at most {LARGEST_LOSS_RATIO} times that of full attention",
        {"loss relative to full attention": ratios, "nats per byte": losses},
        "reproduced" if ratios["mixed"] <= LARGEST_LOSS_RATIO else "not reproduced",
    )


def windows_lose_recall(run: Run) -> Finding:
    """Recall at distances that stacked windows do not reach.

    A short convolution below every stack writes each value next to its key, so that what is compared is how
    far a stack sees, not how soon it learns to look at the token before.
    """
    task = TASKS.get("associative_recall")
    learned = task(task.Config(**run["recall"]))
    window, depth = run["recall window"], run["depth"]
    # A layer reads window - 1 tokens back and the convolution 2, from the end of the pairs.
    beyond = 2 * run["recall"]["pairs"] + depth * (window - 1) + 2
    tests = {"all": {}, "beyond reach": {"first": beyond}}
    found = {
        name: [
            accuracy_after_training(
                run,
                f"short_convolution/none, {layout}",
                learned,
                run["recall training"],
                seed=seed,
                name=f"recall, {name}",
                tests=tests,
            )
            for seed in range(run["seeds"])
        ]
        for name, layout in stacks(window, depth).items()
    }
    far = {name: [row["beyond reach"] for row in rows] for name, rows in found.items()}
    verdicts = [
        compare_groups(far["mixed"], far["full"], margin=-NEAR),
        compare_groups(far["mixed"], far["windowed"], margin=FAR_BELOW),
    ]
    return Finding(
        "Windows in every layer lose dependencies beyond their reach; one full layer keeps them.",
        f"recall at positions from {beyond} on, where stacked windows of {window} do not reach any pair: mixed "
        f"spans less than {NEAR} below full attention, and more than {FAR_BELOW} above windows alone, beyond two "
        "standard errors over seeds",
        {"accuracy": found, "chance": learned.chance(), "task": run["recall"]},
        overall(verdicts),
    )


def long_text_helps(run: Run) -> Finding:
    """A model trained on short windows goes on with long ones, or with as many more tokens of short ones."""
    short, long = run["short"], run["text training"]["length"]
    found: dict[str, list[float]] = {"short": [], "short, then short": [], "short, then long": []}
    for seed in range(run["seeds"]):
        losses = run.remember(
            f"continual training, seed {seed}", lambda s=seed: continued(run, short, long, s)
        )
        for name, loss in losses.items():
            found[name].append(loss)
    return Finding(
        "Continual training on long texts improves a short-trained model on long texts.",
        f"held-out loss at length {long}: lower after going on at {long} than after as many more tokens at "
        f"{short}, beyond two standard errors over seeds",
        {"nats per byte": found, "tokens": {"before": run["tokens"], "after": run["more tokens"]}},
        compare_groups(found["short, then short"], found["short, then long"]),
    )


def continued(run: Run, short: int, long: int, seed: int) -> dict[str, float]:
    from copy import deepcopy

    from seqmix.data.text import read_text, split_text
    from seqmix.train import evaluate, train
    from seqmix.train.language import TRAINING_SHARE

    corpus = read_text(run["data"])
    _, held_out = split_text(corpus, TRAINING_SHARE)
    scored, _ = split_text(held_out, run["scored share"])
    layout = stacks(run["text window"], run["depth"])["mixed"]
    spec, training = specify(layout, run["text training"])
    per_step = training.pop("batch") * training.pop("length")
    training = {k: v for k, v in training.items() if k != "steps"} | {"progress": False}

    def at(length: int) -> dict[str, int]:
        return {"length": length, "batch": per_step // length}

    before = train(spec, corpus, seed=seed, tokens=run["tokens"], **at(short), **training)
    words = before.tokenizer
    models = {"short": deepcopy(before.model)}
    for name, length in (("short, then short", short), ("short, then long", long)):
        models[name] = train(
            deepcopy(before.model),
            corpus,
            tokenizer=words,
            seed=seed + 1000,  # another order of the text than before
            tokens=run["more tokens"],
            **at(length),
            **training,
        ).model
    return {
        name: evaluate(model, scored, length=long, tokenizer=words, progress=False)["loss"]
        for name, model in models.items()
    }


CLAIM = Claim(
    title="Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer",
    paper="arXiv:2310.12442",
    claimed="A Transformer with full attention in a few layers and sparse, local attention in the others models "
    "language about as well as one with full attention everywhere, at up to 75 % less attention cost; windows "
    "alone lose long-range dependencies; continual training on long texts carries a short-trained model over.",
    where="abstract; the experiments on language modelling, and on continual training with long texts",
    measure=measure,
    quick={
        "depth": 2,
        "seeds": 1,
        "lengths": [64, 256],
        "repeats": 1,
        "data": QUICK_TEXT,
        "text window": 8,
        "text training": {
            "width": 32,
            "heads": 2,
            "steps": 3,
            "length": 64,
            "batch": 2,
            "learning_rate": 3e-3,
            "evaluation_tokens": 1024,
        },
        "short": 16,
        "tokens": 512,
        "more tokens": 512,
        "scored share": 0.1,
        "recall window": 4,
        "recall": {"length": 48, "pairs": 4, "vocabulary": 16, "power": 1.0},
        "recall training": {
            "width": 32,
            "heads": 2,
            "channel": "none",
            "steps": 3,
            "batch": 8,
            "learning_rate": 5e-3,
        },
    },
    full={
        "depth": 4,
        "seeds": 2,
        "lengths": [512, 2048, 4096],
        "repeats": 5,
        "data": "shakespeare",
        "text window": 32,
        "text training": {
            "width": 64,
            "heads": 2,
            "steps": 300,
            "length": 512,
            "batch": 4,
            "learning_rate": 3e-3,
            "evaluation_tokens": 32768,
        },
        "short": 128,
        "tokens": 614400,
        "more tokens": 409600,
        "scored share": 0.1,
        "recall window": 8,
        "recall": {"length": 96, "pairs": 8, "vocabulary": 32, "power": 1.0},
        "recall training": {
            "width": 64,
            "heads": 2,
            "channel": "none",
            "steps": 500,
            "stop_at": 0.999,
            "batch": 32,
            "learning_rate": 5e-3,
        },
    },
)
