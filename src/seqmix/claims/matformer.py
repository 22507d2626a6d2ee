"""MatFormer: one trained model holds smaller ones that are as good as if trained alone (Devvrit et al. 2023)."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._bytes import ROWS, VOCABULARY, byte_windows, loss_on, spread
from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._timing import median_milliseconds
from seqmix.claims._training import QUICK_TEXT

SIZES = (0.125, 0.25, 0.5, 1.0)  # shares of the neurons: S, M, L and XL
NEAR = 0.01  # share by which a loss may be higher
GUESSES = 4  # tokens of the drafter that the whole model checks at a time


def measure(run: Run) -> list[Finding]:
    seeds = range(run["seeds"])
    nested = [run.remember(f"nested, seed {s}", lambda s=s: nested_models(run, s)) for s in seeds]
    alone = [run.remember(f"alone, seed {s}", lambda s=s: separate_models(run, s)) for s in seeds]
    return [
        as_good(nested, alone),
        mixtures(nested),
        consistent(nested, alone),
        same_text(nested, alone),
        better_guesses(nested, alone),
        faster(nested, alone),
    ]


def new_model(run: Run, share: float, seed: int) -> Any:
    from seqmix.models.hf import create

    hidden = round(share * run["hidden"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layout = f"{run['depth']}x[attention(heads=4)/mlp(hidden={hidden})]"
        return create(layout, width=run["width"], vocabulary=VOCABULARY)


def trained(run: Run, model: Any, shares: tuple[float, ...], seed: int) -> Any:
    """`model` after `steps` batches for each of the shares, drawn at random."""
    from seqmix.compress.elastic import Nested, one_share
    from seqmix.train.objective import train_objective

    train_objective(
        model,
        byte_windows(run["data"], run["length"])[0],
        Nested(one_share(run["depth"], shares)),
        steps=run["steps"] * len(shares),
        batch=run["batch"],
        learning_rate=run["learning_rate"],
        seed=seed,
    )
    return model.eval()


def nested_models(run: Run, seed: int) -> dict[str, Any]:
    from seqmix.compress.elastic import sub_network

    whole = trained(run, new_model(run, 1.0, seed), SIZES, seed)

    def taken(*shares: float) -> Any:
        return sub_network(whole, torch.tensor([[1.0, share] for share in shares]))

    between = {
        f"{low:g} to {high:g}": taken(*torch.linspace(low, high, run["depth"]).tolist())
        for low, high in itertools.pairwise(SIZES)
    }
    return describe(run, {share: taken(*[share] * run["depth"]) for share in SIZES}) | {
        "mixtures": {name: point(run, model) for name, model in between.items()}
    }


def separate_models(run: Run, seed: int) -> dict[str, Any]:
    models = {s: trained(run, new_model(run, s, seed), (1.0,), seed) for s in SIZES}
    return describe(run, models)


def describe(run: Run, models: dict[float, Any]) -> dict[str, Any]:
    """Losses, agreement with the whole model, and what guessing by the smallest one gives."""
    whole = models[1.0]
    return {
        "sizes": {f"{share:g}": point(run, model) for share, model in models.items()},
        "agreement": {
            f"{share:g}": agreement(run, model, whole) for share, model in models.items()
        },
        "speculation": speculation(run, whole, models[SIZES[0]]),
    }


def point(run: Run, model: Any) -> dict[str, float]:
    return {"parameters": model.num_parameters(), "loss": loss_on(model, held_out(run))}


def held_out(run: Run) -> Tensor:
    return spread(byte_windows(run["data"], run["length"])[1], run["rows"])


@torch.no_grad()
def agreement(run: Run, model: Any, whole: Any) -> float:
    """The share of held-out places where both find the same byte the most likely."""
    same = [
        (model(input_ids=part).logits.argmax(-1) == whole(input_ids=part).logits.argmax(-1)).float()
        for part in held_out(run).split(ROWS)
    ]
    return float(torch.cat(same).mean())


def speculation(run: Run, whole: Any, drafter: Any) -> dict[str, Any]:
    """Texts of both ways to decode, and their times."""
    from seqmix.generate import DraftModel, Sampling, Speculative

    prompts = [row[None, : run["prompt"]] for row in held_out(run)[: run["prompts"]]]
    new = run["new tokens"]
    greedy = Sampling(temperature=0.0)
    guided = Speculative(drafter=DraftModel(drafter), guesses=GUESSES)

    def decode(method: Any) -> list[Any]:
        return [method.run(whole, prompt, new_tokens=new)[0] for prompt in prompts]

    pairs = list(zip(decode(greedy), decode(guided), strict=True))
    calls = {"plain": lambda: decode(greedy), "guided": lambda: decode(guided)}
    times = median_milliseconds(calls, run["repeats"])
    return {
        "equal texts": sum(a.ids == b.ids for a, b in pairs) / len(prompts),
        "tokens per check": [new / found.checks for _, found in pairs],
        "milliseconds per token": {k: t / new / len(prompts) for k, t in times.items()},
    }


Results = list[dict[str, Any]]


def by_size(found: Results, key: str = "loss") -> dict[str, list[float]]:
    return {s: [seed["sizes"][s][key] for seed in found] for s in found[0]["sizes"]}


def as_good(nested: Results, alone: Results) -> Finding:
    ours, theirs = by_size(nested), by_size(alone)
    ratios = {s: statistics.fmean(ours[s]) / statistics.fmean(theirs[s]) for s in ours}
    return Finding(
        "Models taken out of one nested model predict as well as models of their sizes trained alone, with as many "
        "batches in all.",
        f"at every size a loss at most {NEAR:.0%} higher, mean over seeds",
        {"nested": ours, "alone": theirs, "ratio": ratios},
        "reproduced" if max(ratios.values()) <= 1 + NEAR else "not reproduced",
    )


def mixtures(nested: Results) -> Finding:
    excess: dict[str, float] = {}
    for name in nested[0]["mixtures"]:
        low, high = name.split(" to ")
        found = []
        for seed in nested:
            (p0, l0), (p1, l1) = (tuple(seed["sizes"][s].values()) for s in (low, high))
            p, loss = seed["mixtures"][name].values()
            found.append(loss / (l0 + (l1 - l0) * (p - p0) / (p1 - p0)))
        excess[name] = statistics.fmean(found)
    return Finding(
        "Mixtures of widths that were never trained lie on the curve of those that were.",
        f"a loss at most {NEAR:.0%} above the line between the two trained neighbours, by parameters",
        {
            "loss relative to the line": excess,
            "mixtures by seed": [seed["mixtures"] for seed in nested],
        },
        "reproduced" if max(excess.values()) <= 1 + NEAR else "not reproduced",
    )


def consistent(nested: Results, alone: Results) -> Finding:
    sizes = [size for size in nested[0]["agreement"] if size != "1"]
    ours, theirs = (
        {s: [seed["agreement"][s] for seed in found] for s in sizes} for found in (nested, alone)
    )
    verdicts = {compare_groups(ours[s], theirs[s]) for s in sizes}
    return Finding(
        "Nested models agree with their whole model more often than models trained alone agree with theirs.",
        "share of held-out bytes with the same most likely one, above the others' at every size beyond two standard "
        "errors over seeds",
        {"nested": ours, "alone": theirs},
        verdicts.pop() if len(verdicts) == 1 else "inconclusive",
    )


def same_text(nested: Results, alone: Results) -> Finding:
    equal = {
        name: [seed["speculation"]["equal texts"] for seed in found]
        for name, found in (("nested", nested), ("alone", alone))
    }
    return Finding(
        "Decoding with a smaller model's guesses gives the text of plain greedy decoding.",
        "equal tokens for every prompt",
        equal,
        "reproduced" if min(map(min, equal.values())) == 1 else "not reproduced",
    )


def better_guesses(nested: Results, alone: Results) -> Finding:
    ours, theirs = (
        [value for seed in found for value in seed["speculation"]["tokens per check"]]
        for found in (nested, alone)
    )
    return Finding(
        "The smallest nested model guesses better for its whole model than the smallest one trained alone for its.",
        f"more tokens per check of {GUESSES} guesses, beyond two standard errors over prompts and seeds",
        {
            name: {"mean": statistics.fmean(values), "by prompt": values}
            for name, values in (("nested", ours), ("alone", theirs))
        },
        compare_groups(ours, theirs),
    )


def faster(nested: Results, alone: Results) -> Finding:
    def gains(found: Results) -> list[float]:
        times = [seed["speculation"]["milliseconds per token"] for seed in found]
        return [time["plain"] / time["guided"] for time in times]

    ours, theirs = gains(nested), gains(alone)
    won = statistics.fmean(ours) > 1 and statistics.fmean(ours) > statistics.fmean(theirs)
    return Finding(
        "Guesses of a nested model make decoding faster, and more so than guesses of one trained alone.",
        "time of plain greedy decoding over that with guesses: above 1, and above that of models trained alone",
        {
            "nested": ours,
            "alone": theirs,
            "milliseconds per token": [
                seed["speculation"]["milliseconds per token"] for seed in [*nested, *alone]
            ],
        },
        "reproduced" if won else "not reproduced",
    )


CLAIM = Claim(
    title="MatFormer: Nested Transformer for Elastic Inference",
    paper="arXiv:2310.07707",
    claimed="One model trained at several widths of its channel mixers holds models of all sizes between, as good as "
    "models trained alone, more consistent with the whole model, and so the better drafters for it. Here: models of "
    "up to 2.7 M parameters on bytes of plays, where the paper trains up to 2.6 B.",
    where="sections 3 and 4.1, figures 2 and 3, table 2",
    measure=measure,
    quick={
        "data": QUICK_TEXT,
        "length": 32,
        "width": 16,
        "depth": 2,
        "hidden": 32,
        "batch": 4,
        "steps": 2,
        "learning_rate": 2e-3,
        "rows": 4,
        "prompt": 8,
        "prompts": 2,
        "new tokens": 8,
        "repeats": 1,
        "seeds": 1,
    },
    full={
        "data": "shakespeare",
        "length": 64,
        "width": 192,
        "depth": 2,
        "hidden": 3072,
        "batch": 8,
        "steps": 100,
        "learning_rate": 2e-3,
        "rows": 256,
        "prompt": 32,
        "prompts": 8,
        "new tokens": 96,
        "repeats": 3,
        "seeds": 2,
    },
)
