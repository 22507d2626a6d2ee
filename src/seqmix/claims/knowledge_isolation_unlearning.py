"""Planted facts are traced to the layers that carry them, and unlearned there (Agrawal and Huang 2025)."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.analyze.causal_tracing import mean_effects, trace
from seqmix.claims._claim import Claim, Finding, Run, Verdict
from seqmix.claims._training import QUICK_TEXT
from seqmix.data.packing import IGNORED
from seqmix.models.channel_mixers import channel_mixers
from seqmix.train.unlearn import gradient_ascent, joint_objective, layers_of, unlearn

FORGOTTEN = 0.2  # accuracy on forgotten facts up to which they count as forgotten
RETAINED = 0.9  # accuracy on the others from which they count as kept
HELD = 1.1  # perplexity of other text, as a multiple of that before
LOWER = 1 / 3  # of the layers

FIRST_NAMES = (
    "Tomas Elira Neda Boris Sanja Kelm Ruvo Ditta Oskar Mirel Javi Pela Hugo Lena Zarko Irma"
)
LAST_NAMES = (
    "Varga Quint Holm Brask Tolen Mirov Sandel Korpi Dunmar Fesk Ostrin Galdi Wexby Lurin Pavik "
    "Rostad"
)
CITIES = "Lisbon Oslo Prague Madrid Vienna Dublin Athens Warsaw Berlin Rome Tokyo Cairo"


@dataclass(frozen=True)
class Fact:
    """A person that does not exist, and a city that is one token."""

    prompt: list[int]
    subject: tuple[int, int]  # its tokens in the prompt
    answer: int


class Subject:
    """The model under test, with its tokeniser, and some text that has nothing to do with the facts."""

    def __init__(self, run: Run) -> None:
        from seqmix.train import train

        rows, length = run["other_text"]
        if run["model"] is None:
            trained = train("attention", QUICK_TEXT, progress=False, **run["training"])
            self.model, self.tokenizer = trained.model, trained.tokenizer
        else:
            from seqmix.models.pretrained import load

            self.model, self.tokenizer = load(run["model"])
        from seqmix.data.text import read_text

        words = read_text(run["data"]).documents[-1][: 8 * rows * length]
        self.other = torch.tensor(self.encode(words)[: rows * length]).view(rows, length)

    def encode(self, words: str) -> list[int]:
        return list(self.tokenizer(words, add_special_tokens=False)["input_ids"])

    def facts(self, count: int, *, seed: int) -> list[Fact]:
        """The same for the same seed; no two share a name or a family name."""
        draw = random.Random(seed)
        first, last, all_cities = (words.split() for words in (FIRST_NAMES, LAST_NAMES, CITIES))
        names = zip(draw.sample(first, count), draw.sample(last, count), strict=True)
        cities = [all_cities[i % len(all_cities)] for i in range(count)]
        draw.shuffle(cities)
        made = []
        for name, city in zip(names, cities, strict=True):
            subject = self.encode(" ".join(name))
            prompt = subject + self.encode(" was born in the city of")
            made.append(Fact(prompt, (0, len(subject)), self.encode(f" {city}")[0]))
        return made

    def perplexity_of_other_text(self) -> float:
        with torch.no_grad():
            loss = self.model(input_ids=self.other, labels=self.other, use_cache=False).loss
        return float(loss.exp())

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is done to the weights inside the block is undone after it."""
        before = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        yield
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(before[name])


@cache
def batch_of(facts: tuple[tuple[tuple[int, ...], int], ...]) -> dict[str, Tensor]:
    length = max(len(prompt) for prompt, _ in facts) + 1
    ids, labels = torch.zeros(2, len(facts), length, dtype=torch.long)
    labels.fill_(IGNORED)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(facts):
        size = len(prompt)
        ids[row, : size + 1] = torch.tensor([*prompt, answer])
        labels[row, size] = answer
        mask[row, : size + 1] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batch(facts: Sequence[Fact]) -> dict[str, Tensor]:
    """Padded on the right; only the answers are scored."""
    return batch_of(tuple((tuple(fact.prompt), fact.answer) for fact in facts))


@torch.no_grad()
def accuracy(model: Any, facts: Sequence[Fact]) -> float:
    """The share of facts whose answer is the most probable next token."""
    texts = batch(facts)
    logits = model(
        input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], use_cache=False
    ).logits
    scored = texts["labels"][:, 1:] != IGNORED
    right = logits[:, :-1].argmax(-1) == texts["labels"][:, 1:]
    return float(right[scored].double().mean())


def teach(model: nn.Module, facts: Sequence[Fact], *, steps: int, learning_rate: float) -> None:
    """Full fine-tuning on the answers, but for the embedding."""
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    weights = [weight for weight in model.parameters() if weight is not embedding]
    texts = batch(facts)
    unlearn(
        model,
        lambda trained: trained(**texts, use_cache=False).loss,
        weights,
        steps=steps,
        learning_rate=learning_rate,
    )


def measure_seed(run: Run, subject: Subject, seed: int) -> dict[str, Any]:
    """Teaching, tracing, and every way of unlearning from the same taught model."""
    model = subject.model
    facts = subject.facts(run["facts"], seed=seed)
    forget, retain = facts[: len(facts) // 2], facts[len(facts) // 2 :]
    with subject.unchanged():
        teach(model, facts, **run["teaching"])
        taught = accuracy(model, facts)
        before = subject.perplexity_of_other_text()
        effects = mean_effects(
            [
                trace(
                    model, torch.tensor(fact.prompt), fact.subject, fact.answer, block=run["block"]
                )
                for fact in facts[: run["traced"]]
            ]
        )
        best = max(range(len(effects)), key=effects.__getitem__)
        depth = len(channel_mixers(model))
        blocks = {
            "traced": range(best, best + run["block"]),
            "upper": range(depth - run["block"], depth),
        }

        def curve(
            objective: Callable[[Any], Tensor], weights: list[nn.Parameter], learning_rate: float
        ) -> list[Any]:
            """What is forgotten, what is kept and other text, after every step that is looked at."""
            points = []

            def look(step: int) -> None:
                if step % run["every"] == 0:
                    points.append(
                        {
                            "step": step,
                            "forget": accuracy(model, forget),
                            "retain": accuracy(model, retain),
                            "perplexity": subject.perplexity_of_other_text() / before,
                        }
                    )

            with subject.unchanged():
                unlearn(
                    model,
                    objective,
                    weights,
                    steps=run["steps"],
                    learning_rate=learning_rate,
                    observe=look,
                )
            return points

        curves = {
            f"joint loss, {name} layers": curve(
                joint_objective(batch(forget), batch(retain)),
                layers_of(model, layers),
                run["learning_rates"]["joint"],
            )
            for name, layers in blocks.items()
        }
        curves["gradient ascent"] = curve(
            gradient_ascent(batch(forget)),
            list(model.parameters()),
            run["learning_rates"]["ascent"],
        )
    return {"taught": taught, "effects": effects, "best": best, "depth": depth, "curves": curves}


def best_step(points: Sequence[dict[str, float]]) -> dict[str, float]:
    """Where a method stands best, retain - forget, at the first of such steps: every method may choose its own."""
    return max(points, key=lambda point: point["retain"] - point["forget"])


def measure(run: Run) -> list[Finding]:
    subject = cache(lambda: Subject(run))
    seeds = [
        run.remember(f"seed {seed}", lambda s=seed: measure_seed(run, subject(), s))
        for seed in range(run["seeds"])
    ]
    best = {
        method: [best_step(seed["curves"][method]) for seed in seeds]
        for method in seeds[0]["curves"]
    }
    return [
        facts_are_low(seeds),
        constrained_unlearning(seeds, best["joint loss, traced layers"]),
        against_ascent(best),
    ]


def mean(points: Sequence[dict[str, float]], name: str) -> float:
    return statistics.fmean(point[name] for point in points)


def facts_are_low(seeds: Sequence[dict[str, Any]]) -> Finding:
    starts = [seed["best"] / seed["depth"] for seed in seeds]
    inside = [start <= LOWER for start in starts]
    verdict: Verdict = "reproduced" if all(inside) else "inconclusive"
    return Finding(
        "Causal tracing finds the facts in the channel mixers of the first layers.",
        f"the block of neighbouring layers that gives back most begins in the first {LOWER:.0%} of the layers, for "
        "every seed",
        {
            "layers": seeds[0]["depth"],
            "first layer of the strongest block": [seed["best"] for seed in seeds],
            "indirect effects by first layer, mean over seeds": [
                round(statistics.fmean(values), 4)
                for values in zip(*(seed["effects"] for seed in seeds), strict=True)
            ],
        },
        verdict if any(inside) else "not reproduced",
    )


def constrained_unlearning(
    seeds: Sequence[dict[str, Any]], points: Sequence[dict[str, float]]
) -> Finding:
    forget, retain, rise = (mean(points, name) for name in ("forget", "retain", "perplexity"))
    done = forget <= FORGOTTEN and retain >= RETAINED and rise <= HELD
    return Finding(
        "The joint loss on these layers alone removes the forget set, and keeps the retain set and other text.",
        f"means over seeds, each at its best step: accuracy at most {FORGOTTEN} and at least {RETAINED}, perplexity "
        f"of other text at most {HELD} times that before (paper: 0.14 and 0.94 on its sets)",
        {
            "accuracy once taught": [seed["taught"] for seed in seeds],
            "forget": forget,
            "retain": retain,
            "perplexity of other text, times": rise,
            "steps": [point["step"] for point in points],
        },
        "reproduced" if done else "not reproduced",
    )


def against_ascent(best: dict[str, list[dict[str, float]]]) -> Finding:
    def margin(points: Sequence[dict[str, float]]) -> float:
        return mean(points, "retain") - mean(points, "forget")

    ours, naive = best["joint loss, traced layers"], best["gradient ascent"]
    gain = margin(ours) - margin(naive)
    cheaper = mean(ours, "perplexity") < mean(naive, "perplexity")
    verdict: Verdict = "reproduced" if gain >= 0.2 and cheaper else "inconclusive"
    return Finding(
        "It separates forgotten from kept facts better than gradient ascent on all weights, and harms other text less.",
        "at equal steps, each method at its best step and the best of three learning rates on facts of another seed: "
        "retain minus forget accuracy larger by 0.2 or more, and a smaller rise of the perplexity of other text",
        {
            method: {
                name: mean(points, name) for name in ("forget", "retain", "perplexity", "step")
            }
            for method, points in best.items()
        },
        "not reproduced" if gain <= 0 else verdict,
    )


CLAIM = Claim(
    title="SHA256 at SemEval-2025 Task 4: Selective Amnesia - Constrained Unlearning for Large Language Models via "
    "Knowledge Isolation",
    paper="arXiv:2504.12996",
    claimed="Causal tracing finds facts in the channel mixers of the first layers of a pretrained decoder. A joint "
    "loss on those layers alone, against the facts to forget and for those to keep with a weight that adapts, removes "
    "the first and keeps the second, better than naive gradient ascent.",
    where="sections 3 and 4 (OLMo 1B and 7B on the task's biographies and documents; here SmolLM2-135M, whose weights "
    "come from 4 bits, on planted facts of one token)",
    measure=measure,
    quick={
        "model": None,
        "training": {"steps": 2, "length": 32, "batch": 4, "tokenizer": "bpe:512"},
        "data": QUICK_TEXT,
        "other_text": [2, 32],
        "seeds": 1,
        "facts": 4,
        "traced": 2,
        "block": 1,
        "teaching": {"steps": 3, "learning_rate": 1e-3},
        "steps": 2,
        "every": 1,
        "learning_rates": {"joint": 1e-3, "ascent": 1e-3},
    },
    full={
        "model": "smollm2-135m",
        "data": "shakespeare",
        "other_text": [2, 128],
        "seeds": 2,
        "facts": 16,
        "traced": 8,
        "block": 6,
        "teaching": {"steps": 12, "learning_rate": 1e-4},
        "steps": 12,
        "every": 2,
        "learning_rates": {"joint": 3e-4, "ascent": 2e-5},
    },
)
