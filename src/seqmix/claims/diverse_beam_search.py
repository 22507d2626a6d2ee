"""Diverse beam search: groups of beams that avoid each other find more varied and better lists (Vijayakumar 2016)."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from torch import Tensor

from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._finetuning import pretrained, windows
from seqmix.claims._training import QUICK_TEXT
from seqmix.data.text import read_text, split_text

ORDERS = (1, 2, 3, 4)  # lengths of the n-grams that are counted


def measure(run: Run) -> list[Finding]:
    found = run.remember("texts", lambda: searched(run))
    return [more_distinct(found), better_oracle(found), better_top(found)]


def methods(run: Run) -> dict[str, Any]:
    """Searches that keep equally many beams: one group, groups of one beam, and what lies between."""
    from seqmix.generate import Beams, DiverseBeams

    beams, strength = run["beams"], run["strength"]
    return {
        "beam search": Beams(width=beams),
        "diverse": DiverseBeams(groups=beams, width=1, strength=strength),
        "diverse, groups of two": DiverseBeams(groups=beams // 2, width=2, strength=strength),
    }


def searched(run: Run) -> dict[str, Any]:
    """For every method and prompt: distinct n-grams, overlap with the text that follows, log-probability."""
    model, tokenizer = pretrained(run)
    text = "\n".join(split_text(read_text(run["data"]))[1].documents)
    rows = windows(tokenizer, text, run["prompts"], run["prompt"] + run["new tokens"])
    results: dict[str, Any] = {name: [] for name in methods(run)}
    for row in rows:
        for name, method in methods(run).items():
            texts = method.run(
                model, row[None, : run["prompt"]], new_tokens=run["new tokens"], texts=run["beams"]
            )
            described = describe([text.ids for text in texts], row[run["prompt"] :])
            # Texts have one length, so the best of all is the likeliest.
            best = max(range(len(texts)), key=lambda place: texts[place].log_probability)
            described["top"] = described["overlaps"][best]
            described["highest log-probability"] = texts[best].log_probability
            results[name].append(described)
    example = (
        {
            name: [
                tokenizer.decode(text.ids)
                for text in method.run(
                    model, rows[:1, : run["prompt"]], new_tokens=run["new tokens"], texts=3
                )
            ]
            for name, method in methods(run).items()
        }
        if run["examples"]
        else {}
    )
    return {"by method": results, "first texts": example}


def describe(texts: list[list[int]], following: Tensor) -> dict[str, Any]:
    words = sum(map(len, texts))
    distinct = {
        str(order): len(
            {tuple(ids[i : i + order]) for ids in texts for i in range(len(ids) - order + 1)}
        )
        / words
        for order in ORDERS
    }
    overlaps = [overlap(ids, following.tolist()) for ids in texts]
    return {"distinct": distinct, "overlaps": overlaps, "oracle": max(overlaps)}


def overlap(ids: list[int], wanted: list[int]) -> float:
    """F1 of the tokens of two texts, whatever their order: 2 common / (tokens of both)."""
    return 2 * (Counter(ids) & Counter(wanted)).total() / (len(ids) + len(wanted))


def compared(found: dict[str, Any], key: str) -> tuple[dict[str, Any], list[float]]:
    """Means of a measure by method, and by prompt what groups of one beam add to beam search."""
    values = {name: [one[key] for one in each] for name, each in found["by method"].items()}
    gains = [a - b for a, b in zip(values["diverse"], values["beam search"], strict=True)]
    means: dict[str, Any] = {name: statistics.fmean(each) for name, each in values.items()}
    return means | {"gain by prompt": gains}, gains


def more_distinct(found: dict[str, Any]) -> Finding:
    means = {
        name: {str(n): statistics.fmean(one["distinct"][str(n)] for one in each) for n in ORDERS}
        for name, each in found["by method"].items()
    }
    verdicts = set()
    for n in map(str, ORDERS):
        ours, theirs = (
            [one["distinct"][n] for one in found["by method"][name]]
            for name in ("diverse", "beam search")
        )
        gains = [a - b for a, b in zip(ours, theirs, strict=True)]
        verdicts.add(compare_groups(gains, [0.0]))
    return Finding(
        "With as many beams, the list of texts has more distinct n-grams than that of beam search.",
        "distinct n-grams per token of the list, n = 1 to 4: above beam search for every n, by two standard errors of "
        "the difference over prompts",
        {"mean by n": means, "first texts": found["first texts"]},
        verdicts.pop() if len(verdicts) == 1 else "inconclusive",
    )


def better_oracle(found: dict[str, Any]) -> Finding:
    means, gains = compared(found, "oracle")
    return Finding(
        "The best text of the list, judged by what really follows, is better than beam search's.",
        "F1 of tokens with the text that follows, the list's best: above beam search by two standard errors of the "
        "difference over prompts",
        means,
        compare_groups(gains, [0.0]),
    )


def better_top(found: dict[str, Any]) -> Finding:
    means, gains = compared(found, "top")
    likelihoods, _ = compared(found, "highest log-probability")
    return Finding(
        "The likeliest text of the list is better than beam search's too.",
        "F1 of tokens with the text that follows, the likeliest text's: above beam search by two standard errors of "
        "the difference over prompts",
        means | {"its log-probability": likelihoods},
        compare_groups(gains, [0.0]),
    )


CLAIM = Claim(
    title="Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models",
    paper="arXiv:1610.02424",
    claimed="Dividing beams into groups that are rewarded for differing from one another, by the Hamming term, gives "
    "lists that are more diverse and hold better texts than beam search at the same number of beams, and a better "
    "first text. Here: a language model of 135 M parameters that continues code, where the paper captions images and "
    "translates.",
    where="abstract; sections 4 and 5, tables 1 and 2 (distinct n-grams, oracle and top-1 scores)",
    measure=measure,
    quick={
        "model": None,
        "data": QUICK_TEXT,
        "prompts": 3,
        "prompt": 8,
        "new tokens": 6,
        "beams": 4,
        "strength": 0.5,
        "examples": False,
    },
    full={
        "model": "smollm2-135m",
        "data": "python_code",
        "prompts": 20,
        "prompt": 32,
        "new tokens": 16,
        "beams": 6,
        "strength": 0.5,
        "examples": True,
    },
)
