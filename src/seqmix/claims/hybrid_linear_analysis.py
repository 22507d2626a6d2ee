"""Hybrids of linear and full attention: six mixers times five ratios, as one sweep (Wang et al. 2025)."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

from seqmix.claims._claim import Claim, Finding, Run, Verdict, compare_groups
from seqmix.claims._training import QUICK_TEXT, accuracy_after_training, loss_after_training
from seqmix.tasks import TASKS

MIXERS = ("retention", "gated_linear_attention", "hgrn2", "delta_net", "gated_delta_net", "mamba2")
RATIOS = {  # linear to full, in four layers: the same attention for all mixers at 0:4
    "4:0": "4x[{mixer}]",
    "3:1": "3x[{mixer}], attention",
    "2:2": "2x[{mixer}, attention]",
    "1:3": "{mixer}, 3x[attention]",
    "0:4": "4x[attention]",
}
# The same short convolution lies below every stack. It tells each token the one before, so that what is
# compared is the stack's memory, not how soon it learns that: some of the mixers come with convolutions.
BELOW = "short_convolution/none, "
PURE, FULL = "4:0", "0:4"
HYBRIDS = ("3:1", "2:2", "1:3")
GAIN = 0.1  # of recall, from no full attention to half of the layers
LARGEST_SPREAD = 0.03  # of the language-model loss over the ratios

Table = dict[str, dict[str, list[float]]]  # values per seed, by ratio and mixer


def measure(run: Run) -> list[Finding]:
    accuracies, losses = recall(run), language(run)
    return [
        recall_rises(run, accuracies),
        loss_hardly_moves(losses),
        best_pure_is_not_best_hybrid(accuracies, losses),
    ]


def layout(mixer: str, ratio: str) -> str:
    return BELOW + RATIOS[ratio].format(mixer=mixer)


def recall(run: Run) -> Table:
    """Accuracy of associative recall."""
    task = TASKS.get("associative_recall")
    learned = task(task.Config(**run["recall"]))

    def trained(mixer: str, ratio: str, seed: int) -> float:
        return accuracy_after_training(
            run,
            layout(mixer, ratio),
            learned,
            run["recall training"],
            seed=seed,
            name=f"recall, {_label(mixer, ratio)}",
        )["training length"]

    return _sweep(run["recall seeds"], trained)


def language(run: Run) -> Table:
    """Held-out loss on text, in nats per byte."""

    def trained(mixer: str, ratio: str, seed: int) -> float:
        return loss_after_training(
            run,
            layout(mixer, ratio),
            run["data"],
            run["text training"],
            seed=seed,
            name=f"text, {_label(mixer, ratio)}",
        )

    return _sweep(run["text seeds"], trained)


def _label(mixer: str, ratio: str) -> str:
    return "attention" if ratio == FULL else f"{mixer} {ratio}"


def _sweep(seeds: int, trained: Any) -> Table:
    return {
        ratio: {mixer: [trained(mixer, ratio, seed) for seed in range(seeds)] for mixer in MIXERS}
        for ratio in RATIOS
    }


def mean_by_ratio(table: Table) -> dict[str, float]:
    return {
        ratio: statistics.fmean(value for values in row.values() for value in values)
        for ratio, row in table.items()
    }


def recall_rises(run: Run, accuracies: Table) -> Finding:
    means = mean_by_ratio(accuracies)
    order = list(means.values())
    falls = max(before - after for before, after in pairwise(order))
    # A mixer is one sample: what is claimed is a rise for linear mixers in general.
    pure, half = (
        [statistics.fmean(values) for values in accuracies[ratio].values()]
        for ratio in (PURE, "2:2")
    )
    verdict: Verdict = compare_groups(half, pure, margin=GAIN)
    if verdict == "reproduced" and falls > 0.02:
        verdict = "inconclusive"
    return Finding(
        "Recall rises with the share of full attention.",
        f"mean accuracy over the six mixers at least {GAIN} higher with half of the layers full than with none, "
        "beyond two standard errors over mixers, and at no ratio more than 0.02 below that of the ratio before",
        {
            "mean accuracy by ratio": means,
            "accuracy by ratio, mixer and seed": accuracies,
            "task": run["recall"],
        },
        verdict,
    )


def loss_hardly_moves(losses: Table) -> Finding:
    means = mean_by_ratio(losses)
    spread = max(means.values()) / min(means.values()) - 1
    by_mixer = {}
    for mixer in MIXERS:
        row = [statistics.fmean(losses[ratio][mixer]) for ratio in RATIOS]
        by_mixer[mixer] = max(row) / min(row) - 1
    return Finding(
        "Language-model loss hardly moves with the share of full attention.",
        f"mean loss over the six mixers: highest and lowest ratio at most {LARGEST_SPREAD:.0%} apart",
        {
            "relative spread of the mean over ratios": spread,
            "relative spread by mixer": by_mixer,
            "mean nats per byte by ratio": means,
            "nats per byte by ratio, mixer and seed": losses,
        },
        "reproduced" if spread <= LARGEST_SPREAD else "not reproduced",
    )


def best_pure_is_not_best_hybrid(accuracies: Table, losses: Table) -> Finding:
    swaps, verdict = exchanges(accuracies)
    orders = {"recall": (accuracies, True), "language-model loss": (losses, False)}
    return Finding(
        "The mixer that is best alone is not always the best in a hybrid.",
        "the mixer with the best recall alone is worse, in a hybrid of some ratio, than one that is worse alone, "
        "both beyond two standard errors over seeds",
        {
            "exchanged beyond the noise of seeds": swaps,
            "ranking by ratio, best first": {
                name: {ratio: ranking(table[ratio], descending) for ratio in (PURE, *HYBRIDS)}
                for name, (table, descending) in orders.items()
            },
        },
        verdict,
    )


def ranking(row: dict[str, list[float]], descending: bool) -> list[str]:
    return sorted(row, key=lambda mixer: statistics.fmean(row[mixer]), reverse=descending)


def exchanges(table: Table) -> tuple[list[str], Verdict]:
    """Where the mixer that is best alone is surely worse, in a hybrid, than one that is surely worse alone.

    Only the best is compared: among all pairs at all ratios, chance alone would exchange some. One seed has no
    spread, so that nothing is beyond it. Where nothing is exchanged but another mixer leads, more seeds could
    tell.
    """

    def surely(better: list[float], worse: list[float]) -> bool:
        return min(len(better), len(worse)) > 1 and compare_groups(better, worse) == "reproduced"

    pure = table[PURE]
    best = ranking(pure, True)[0]
    swaps = [
        f"{best} above {other} alone, below it at {ratio}"
        for other in MIXERS
        for ratio in HYBRIDS
        if surely(pure[best], pure[other]) and surely(table[ratio][other], table[ratio][best])
    ]
    if swaps:
        return swaps, "reproduced"
    leads = all(ranking(table[ratio], True)[0] == best for ratio in HYBRIDS)
    return swaps, "not reproduced" if leads else "inconclusive"


CLAIM = Claim(
    title="A Systematic Analysis of Hybrid Linear Attention",
    paper="arXiv:2507.06457",
    claimed="Over six linear mixers and five ratios of linear to full attention layers, recall rises with the share "
    "of full attention while the language-model loss stays about the same, and the mixer that is best alone is not "
    "necessarily the best in a hybrid.",
    where="abstract; the sweep over mixers and ratios",
    measure=measure,
    quick={
        "recall seeds": 1,
        "recall": {"length": 16, "pairs": 2, "vocabulary": 8},
        "recall training": {
            "width": 16,
            "heads": 2,
            "channel": "none",
            "steps": 1,
            "batch": 2,
            "learning_rate": 5e-3,
        },
        "text seeds": 1,
        "data": QUICK_TEXT,
        "text training": {
            "width": 16,
            "heads": 2,
            "steps": 1,
            "length": 32,
            "batch": 1,
            "learning_rate": 3e-3,
            "evaluation_tokens": 128,
        },
    },
    full={
        "recall seeds": 2,
        "recall": {"length": 32, "pairs": 8, "vocabulary": 32},
        "recall training": {
            "width": 64,
            "heads": 2,
            "channel": "none",
            "steps": 500,
            "batch": 32,
            "learning_rate": 5e-3,
            "stop_at": 0.999,
        },
        "text seeds": 1,
        "data": "shakespeare",
        "text training": {
            "width": 64,
            "heads": 2,
            "steps": 120,
            "length": 128,
            "batch": 8,
            "learning_rate": 5e-3,
            "evaluation_tokens": 16384,
        },
    },
)
