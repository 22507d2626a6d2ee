"""SimQ-NAS: sub-networks and bits searched together beat the whole model in 8 bits (Sridhar et al. 2023)."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from seqmix.claims._bytes import VOCABULARY, byte_windows, loss_on, spread
from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._timing import median_milliseconds
from seqmix.claims._training import QUICK_TEXT

EQUAL = 0.005  # share by which a loss may be higher and still count as equal
RANKED = 0.7  # rank correlation of what was predicted and what was measured
MIXERS, CHANNELS = (
    (0.0, 0.5, 1.0),
    (0.25, 0.5, 1.0),
)  # shares of heads and neurons that are searched
WHOLE = 0.25  # share of the batches that train the whole network

Figures = dict[str, float]


def measure(run: Run) -> list[Finding]:
    found = run.remember("search", lambda: searched(run))
    return [beats_int8(found), predictors_rank(found), better_than_random(found)]


def searched(run: Run) -> dict[str, Any]:
    """A trained super-network, the policies that a search and chance found in it, and the best on unseen text."""
    from seqmix.measure.footprint import stored_bytes
    from seqmix.search.policy import Policy, Space
    from seqmix.search.predictor import Measured, front, search_policies

    train, held_out = byte_windows(run["data"], run["length"])
    known, unseen = spread(held_out, 2 * run["rows"]).view(run["rows"], 2, -1).unbind(1)
    model = super_network(run, train)
    space = Space.of(model, mixers=MIXERS, channels=CHANNELS)
    int8 = space.make(model, space.whole(8))

    def figures(policy: Policy) -> Figures:
        made = space.make(model, policy)
        return {
            "loss": loss_on(made, known),
            "bytes": stored_bytes(made),
            "latency": 1.0
            if policy == space.whole(8)
            else relative_time(made, int8, train[0], run["repeats"]),
        }

    generator = torch.Generator().manual_seed(run["seed"])
    first = [space.whole(8), space.whole(32)]
    first += [space.draw(generator) for _ in range(run["first"])]
    policies = search_policies(
        space,
        figures,
        first=first,
        rounds=run["rounds"],
        per_round=run["per round"],
        guesses=run["guesses"],
        seed=run["seed"],
    )
    guided = policies[len(first) :]
    chance = policies[: len(first)] + [
        Measured(policy, figures(policy))
        for policy in (space.draw(generator) for _ in range(len(guided)))
    ]
    baseline = policies[0].figures
    equal = [m for m in front(policies) if m.figures["loss"] <= (1 + EQUAL) * baseline["loss"]]
    smaller = [
        m
        for m in equal
        if m.figures["bytes"] < baseline["bytes"] and m.figures["latency"] < baseline["latency"]
    ]
    best = min(smaller or equal, key=lambda m: m.figures["bytes"] * m.figures["latency"])
    made = space.make(model, best.policy)
    calls: dict[str, Callable[[], object]] = {
        "int8": lambda: read(int8, train[0]),
        "found": lambda: read(made, train[0]),
    }
    return {
        "measured": len(policies),
        "front": [m.figures for m in front(policies)],
        "front by chance": [m.figures for m in front(chance)],
        "predicted": [m.predicted for m in guided],
        "then measured": [m.figures for m in guided],
        "whole in 32 bits": policies[1].figures,
        "whole in 8 bits": baseline,
        "best": {
            "choices": space.describe(best.policy),
            "loss on unseen text": {"int8": loss_on(int8, unseen), "found": loss_on(made, unseen)},
            "bytes": {"int8": stored_bytes(int8), "found": stored_bytes(made)},
            "milliseconds": median_milliseconds(calls, run["final repeats"]),
        },
    }


def super_network(run: Run, train: Tensor) -> Any:
    """A model of which another sub-network was trained with every batch, the whole one with some."""
    from seqmix.compress.elastic import Nested
    from seqmix.models.hf import create
    from seqmix.search.policy import Space
    from seqmix.train.objective import train_objective

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run["seed"])
        layout = f"{run['depth']}x[attention(heads=4)/glu]"
        model = create(layout, width=run["width"], vocabulary=VOCABULARY)
    space = Space.of(model, mixers=MIXERS, channels=CHANNELS)

    def draw(generator: Generator) -> Tensor:
        is_whole = float(torch.rand((), generator=generator)) < WHOLE
        return space.shares(space.whole(32) if is_whole else space.draw(generator))

    train_objective(
        model,
        train,
        Nested(draw),
        steps=run["steps"],
        batch=run["batch"],
        learning_rate=run["learning_rate"],
        seed=run["seed"],
    )
    return model.eval()


@torch.inference_mode()
def read(model: Any, ids: Tensor) -> None:
    model.model(ids[None])


def relative_time(model: Any, baseline: Any, ids: Tensor, repeats: int) -> float:
    """The median over rounds of the time to read a text over that of the baseline, which is measured beside it."""
    ratios = []
    order = random.Random(0)
    for number in range(repeats + 1):
        seconds = {}
        for name, subject in order.sample([("made", model), ("baseline", baseline)], 2):
            start = time.perf_counter()
            read(subject, ids)
            seconds[name] = time.perf_counter() - start
        if number:  # the first round warms up
            ratios.append(seconds["made"] / seconds["baseline"])
    return statistics.median(ratios)


def beats_int8(found: dict[str, Any]) -> Finding:
    best = found["best"]
    ratios = {
        "loss on unseen text": share(best["loss on unseen text"]),
        "bytes": share(best["bytes"]),
        "milliseconds": share(best["milliseconds"]),
    }
    won = ratios["loss on unseen text"] <= 1 + EQUAL
    won = won and ratios["bytes"] < 1 and ratios["milliseconds"] < 1
    return Finding(
        "A policy found by the search is smaller and faster than the whole model in 8 bits, at equal quality.",
        f"fewer bytes and less time to read a text, at a loss on unseen text at most {EQUAL:.1%} higher",
        {
            "found relative to int8": ratios,
            **best,
            "whole in 8 bits": found["whole in 8 bits"],
            "whole in 32 bits": found["whole in 32 bits"],
            "front": found["front"],
        },
        "reproduced" if won else "not reproduced",
    )


def predictors_rank(found: dict[str, Any]) -> Finding:
    correlations = {
        name: rank_correlation(
            [guess[name] for guess in found["predicted"]],
            [figures[name] for figures in found["then measured"]],
        )
        for name in found["whole in 8 bits"]
    }
    return Finding(
        "Lightly trained predictors tell policies apart that they have not seen.",
        f"Spearman correlation of predicted and then measured figures at least {RANKED} for each",
        {"correlation": correlations, "measured policies": found["measured"]},
        "reproduced" if min(correlations.values()) >= RANKED else "not reproduced",
    )


def better_than_random(found: dict[str, Any]) -> Finding:
    ours, theirs = found["front"], found["front by chance"]
    covered, covering = coverage(ours, theirs), coverage(theirs, ours)
    return Finding(
        "With predictors the search finds a better front than chance with as many measurements.",
        "the share of the front by chance that the found one beats is larger than the reverse",
        {"chance beaten": covered, "found beaten": covering, "front by chance": theirs},
        "reproduced" if covered > covering else "not reproduced",
    )


def share(pair: dict[str, float]) -> float:
    return pair["found"] / pair["int8"]


def coverage(one: Sequence[Figures], other: Sequence[Figures]) -> float:
    """The share of `other` that some of `one` beat."""
    from seqmix.search.predictor import beats

    return sum(any(beats(a, b) for a in one) for b in other) / len(other)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, of which equal values share the mean one."""

    def ranks(values: Sequence[float]) -> list[float]:
        below = [sum(v < value for v in values) for value in values]
        return [b + (values.count(v) - 1) / 2 for b, v in zip(below, values, strict=True)]

    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return statistics.correlation(ranks(one), ranks(other))


CLAIM = Claim(
    title="SimQ-NAS: Simultaneous Quantization Policy and Neural Architecture Search",
    paper="arXiv:2312.13301",
    claimed="A multi-objective search with light predictors finds sub-networks and bits per layer together that are "
    "smaller and faster than the whole model in 8 bits, without loss of quality. Here: a super-network of 0.8 M "
    "parameters on bytes of plays, with 8 or 32 bits; the paper's are ViT, BERT, BEiT-3 and ResNet.",
    where="abstract; section 4",
    measure=measure,
    quick={
        "data": QUICK_TEXT,
        "length": 32,
        "width": 16,
        "depth": 2,
        "batch": 4,
        "steps": 4,
        "learning_rate": 2e-3,
        "rows": 4,
        "repeats": 1,
        "final repeats": 1,
        "first": 6,
        "rounds": 1,
        "per round": 3,
        "guesses": 40,
        "seed": 0,
    },
    full={
        "data": "shakespeare",
        "length": 64,
        "width": 128,
        "depth": 4,
        "batch": 8,
        "steps": 400,
        "learning_rate": 2e-3,
        "rows": 96,
        "repeats": 7,
        "final repeats": 41,
        "first": 18,
        "rounds": 3,
        "per round": 8,
        "guesses": 300,
        "seed": 0,
    },
)
