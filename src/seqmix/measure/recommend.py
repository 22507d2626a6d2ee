"""From the records of trials to one summary per candidate, and to the one that a budget recommends."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from seqmix.measure.budget import Term

QUALITY = "bits_per_byte"  # what the recommendation minimises
CLEAR = 3.0  # standard deviations over seeds: seeds are few, so two would claim too much
MEGABYTE = 2**20


def summarise(
    candidate: str, records: Sequence[Mapping[str, Any]], terms: Sequence[Term]
) -> dict[str, Any]:
    """One row: quality with its spread over seeds, figures (medians over seeds), and the budget's verdict.

    `meets` is None where no seed is complete. `missed` names each violated term with the figure.
    """
    done = [record["result"] for record in records if record["state"] == "complete"]
    row: dict[str, Any] = {
        "candidate": candidate,
        "seeds": len(done),
        "failures": [
            {"seed": record["seed"], **record["failure"]}
            for record in records
            if record["state"] == "failed"
        ],
        "meets": None,
        "missed": [],
        "excess": 0.0,
    }
    if not done:
        return row
    losses = [result["quality"][QUALITY] for result in done]
    row |= {
        "quality": statistics.fmean(losses),
        "quality_low": min(losses),
        "quality_high": max(losses),
        "quality_deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        "width": done[0]["spec"]["width"],
        "depth": done[0]["spec"]["depth"],
        "figures": figures(done),
        "meets": True,
    }
    for term in terms:
        if not term.holds(row["figures"]):
            row["meets"] = False
            row["missed"].append({"term": str(term), "value": term.value(row["figures"])})
            row["excess"] += term.excess(row["figures"])
    return row


def figures(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every metric of a budget from the results of all seeds: quality as the mean, the rest as the median."""
    quality = {
        name: statistics.fmean(result["quality"][name] for result in results)
        for name in ("bits_per_byte", "perplexity", "loss")
    }
    serve = [result["serve"] for result in results]
    contexts = list(serve[0]["decode_ms"])

    def by_context(name: str, field: str, factor: float = 1.0) -> dict[str, float]:
        return {c: statistics.median(s[name][c][field] * factor for s in serve) for c in contexts}

    return quality | {
        "parameters": serve[0]["parameters"],
        "memory_mb": statistics.median(s["memory"]["memory_mb"] for s in serve),
        "train_memory_mb": statistics.median(r["train_memory"]["memory_mb"] for r in results),
        "state_mb": by_context("state_bytes", "measured", 1 / MEGABYTE),
        "decode_ms": by_context("decode_ms", "median"),
        "prefill_tokens_s": by_context("prefill_tokens_s", "median"),
        "train_tokens_s": statistics.median(s["train_tokens_s"]["median"] for s in serve),
        "train_seconds": statistics.median(r["training"]["seconds"] for r in results),
    }


def recommend(rows: Sequence[Mapping[str, Any]], terms: Sequence[Term]) -> dict[str, Any]:
    """The candidate of best quality among those that meet the budget, and why; else the nearest.

    `candidate` is None where none meets the budget; `nearest` then names the one that misses it by the
    smallest sum of relative excesses.
    """
    done = [row for row in rows if row["seeds"]]
    fitting = sorted((row for row in done if row["meets"]), key=lambda row: row["quality"])
    wanted = ", ".join(map(str, terms))
    if not done:
        return {
            "candidate": None,
            "nearest": None,
            "reason": "No candidate was trained and measured to the end: see the failures.",
        }
    if not fitting:
        nearest = min(done, key=lambda row: (row["excess"], row["quality"]))
        missed = "; ".join(f"{miss['term']} with {miss['value']:.3g}" for miss in nearest["missed"])
        return {
            "candidate": None,
            "nearest": nearest["candidate"],
            "reason": (
                f"No candidate meets the budget {wanted}. The nearest is {nearest['candidate']}, which "
                f"misses {missed}; its validation bits per byte are {nearest['quality']:.3f}."
            ),
        }
    best, *others = fitting
    return {
        "candidate": best["candidate"],
        "nearest": None,
        "runner_up": others[0]["candidate"] if others else None,
        "reason": " ".join([_first(best, fitting, done, terms), *_margin(best, others)]),
    }


def _first(
    best: Mapping[str, Any],
    fitting: Sequence[Mapping[str, Any]],
    done: Sequence[Mapping[str, Any]],
    terms: Sequence[Term],
) -> str:
    name, quality = best["candidate"], f"{best['quality']:.3f} validation bits per byte"
    if not terms:
        return f"{name} has the best quality of all {len(done)} candidates: {quality}. No budget was given."
    values = ", ".join(f"{term} with {term.value(best['figures']):.3g}" for term in terms)
    if len(fitting) == 1:
        return f"{name} is the only one of {len(done)} candidates that meets the budget ({values}): {quality}."
    return (
        f"{name} has the best quality of the {len(fitting)} of {len(done)} candidates that meet the "
        f"budget: {quality} ({values})."
    )


def _margin(best: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runner-up, and whether the difference means anything."""
    if not others:
        return []
    second = others[0]
    margin = second["quality"] - best["quality"]
    text = (
        f"The runner-up is {second['candidate']} with {second['quality']:.3f}, {margin:.3f} more;"
    )
    spreads = [row["quality_deviation"] for row in (best, second)]
    if None in spreads:
        return [text, "with one seed it is unknown what another seed would change (see seeds)."]
    spread = max(spreads)
    if margin >= CLEAR * spread:
        return [text, f"one standard deviation over seeds is {spread:.3f}, so the order is clear."]
    return [
        text,
        f"one standard deviation over seeds is {spread:.3f}, and a margin below {CLEAR:g} of them "
        "may be chance.",
    ]
