"""Insertion language models: puzzles in any order, and gaps of unknown length (Patel et al. 2025)."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._answers import Answer
from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.data.packing import IGNORED
from seqmix.tasks import TASKS

PUZZLES = {
    "star_graph": "a path through a graph, where the way out of a crossing has to be planned",
    "zebra_puzzle": "a zebra puzzle",
}
WAYS = {  # of writing: the objective and the mixer
    "insertion": ("insertion", "bidirectional_attention"),
    "autoregressive": (None, "attention"),
    "masked diffusion": ("masked_diffusion", "bidirectional_attention"),
}


class Puzzles:
    """Texts of a task: what is known [N, S], then the answer [N, tokens], with `end` behind a shorter one."""

    def __init__(self, run: Run, name: str) -> None:
        kind: Any = TASKS.get(name)
        self.run, self.task = run, kind(kind.Config(**run[name]))
        self.tokens = self.task.answer_length
        self.mask = self.task.vocabulary  # or the word that says that nothing is missing
        self.end = getattr(self.task, "end", self.mask + 1)
        self.vocabulary = self.mask + 2

    def texts(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.task.batch(0, count, split=split)
        known, answer = inputs[:, : 1 - self.tokens], labels[:, -self.tokens :]
        return known, answer.masked_fill(answer == IGNORED, self.end)

    def trained(self, way: str, seed: int) -> Any:
        """All ways get models of one size, and as many steps with as many texts."""
        from seqmix.models.encoder import SeqmixForMaskedLM
        from seqmix.models.hf import create
        from seqmix.objectives import OBJECTIVES, Objective
        from seqmix.train.objective import train_objective

        run, (name, mixer) = self.run, WAYS[way]
        sizes = {"width": run["width"], "vocabulary": self.vocabulary}
        layout = f"{run['depth']}x[{mixer}]"
        goal: Objective = Answer(self.tokens)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if name is None:
                model: Any = create(layout, **sizes)
            else:
                model = SeqmixForMaskedLM.create(layout, **sizes)
                kind = OBJECTIVES.get(name)
                ids = {"mask_id": self.mask, "stop_id": self.mask, "pad_id": self.end}
                options = {key: ids[key] for key in ids if key in kind.Config.fields()}
                goal = kind(kind.Config(tokens=self.tokens, **options))
        texts = torch.cat(self.texts("train", run["texts"]), dim=1)
        options = {"batch": run["batch"], "learning_rate": run["learning_rate"]}
        train_objective(model, texts, goal, steps=run["steps"], seed=seed, **options)
        return model.eval()

    def solved(self, way: str, model: Any) -> list[float]:
        """1 for every new puzzle whose whole answer is right."""
        known, answer = self.texts("test", self.run["tests"])
        return _right(self.write(way, model, known), answer)

    def write(self, way: str, model: Any, known: Tensor, given: Tensor | None = None) -> Tensor:
        """The likeliest answer; with masked diffusion `given` has masks, with insertion it has none."""
        from seqmix.generate.diffusion import denoise
        from seqmix.generate.insertion import insert

        if way == "autoregressive":
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            seen = torch.ones_like(known)
            found = model.generate(
                known, attention_mask=seen, max_new_tokens=self.tokens, **options
            )
            return found[:, known.shape[1] :]  # type: ignore[no-any-return]
        if way == "masked diffusion":
            length = self.tokens if given is None else None
            return denoise(model, known, mask_id=self.mask, length=length, given=given).tokens
        ids = {"stop_id": self.mask, "pad_id": self.end}
        found = insert(model, known, new_tokens=self.tokens, given=given, **ids)
        return found[:, : self.tokens]

    def filled(self, models: dict[str, Any]) -> dict[str, list[float]]:
        """Answers of which some tokens are there in their order, the last one among them: how many are restored."""
        known, answer = self.texts("test", self.run["tests"])
        real = answer != self.end
        goal = real.sum(dim=1, keepdim=True) - 1
        kept = torch.rand(answer.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        kept = (kept & real).scatter(1, goal, True)
        there = [row[keep].tolist() for row, keep in zip(answer, kept, strict=True)]
        spread = [[i for token in row for i in (self.mask, token)] for row in there]
        by_name = {
            "insertion": ("insertion", self.padded(there)),
            "masks, one in every gap": ("masked diffusion", self.padded(spread)),
            "masks, in the right places": (
                "masked diffusion",
                answer.where(kept | ~real, self.mask),
            ),
        }
        return {
            name: _right(self.write(way, models[way], known, given), answer)
            for name, (way, given) in by_name.items()
        }

    def padded(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor([(row + [self.end] * self.tokens)[: self.tokens] for row in rows])


def _right(found: Tensor, answer: Tensor) -> list[float]:
    return (found == answer).all(dim=1).double().tolist()  # type: ignore[no-any-return]


def measure(run: Run) -> list[Finding]:
    def learned(name: str, seed: int) -> dict[str, Any]:
        puzzles = Puzzles(run, name)
        models = {way: puzzles.trained(way, seed) for way in WAYS}
        found = {"solved": {way: puzzles.solved(way, model) for way, model in models.items()}}
        return found | ({"filled": puzzles.filled(models)} if name == "star_graph" else {})

    findings = []
    for name, described in PUZZLES.items():
        found = [
            run.remember(f"{name}, seed {seed}", lambda n=name, s=seed: learned(n, s))
            for seed in range(run["seeds"])
        ]
        findings.append(
            compared(
                found,
                "solved",
                ("autoregressive", "masked diffusion"),
                f"Insertion solves {described} more often than writing in order and than masked diffusion.",
                "whole answers that are right",
            )
        )
        if name == "star_graph":
            filled = compared(
                found,
                "filled",
                ("masks, one in every gap",),
                "Insertion fills gaps of unknown length, which masked diffusion cannot.",
                "paths restored of which the end and each other node with chance 1/2 is given",
            )
    return [*findings, filled]


def compared(
    found: list[dict[str, Any]], key: str, others: tuple[str, ...], statement: str, counted: str
) -> Finding:
    """Every puzzle of every seed counts as one."""
    values = {name: [value for one in found for value in one[key][name]] for name in found[0][key]}
    best = max((values[name] for name in others), key=statistics.fmean)
    return Finding(
        statement,
        f"share of {counted}: above {' and '.join(others)}, by two standard errors over puzzles",
        {name: [statistics.fmean(one[key][name]) for one in found] for name in values},
        compare_groups(values["insertion"], best),
    )


CLAIM = Claim(
    title="Insertion Language Models: Sequence Generation with Arbitrary-Position Insertions",
    paper="arXiv:2505.05755",
    claimed="A model that inserts one token at a time, at a place that it chooses together with the token, solves "
    "planning puzzles more often than one that writes in order and than masked diffusion, and fills gaps whose "
    "length nobody knows. Here: bidirectional Transformers of 0.1 M parameters, on graphs of two paths and puzzles of "
    "three houses, and as many training steps for all; the paper's have 85 M parameters and far larger puzzles.",
    where="planning with star graphs (table 1) and zebra puzzles; infilling (table 3, there of sentences and stories)",
    measure=measure,
    quick={
        "star_graph": {"nodes": 9, "paths": 2, "longest_path": 4, "length": 11},
        "zebra_puzzle": {"attributes": 2, "clues": 6, "length": 24},
        "width": 16,
        "depth": 1,
        "texts": 64,
        "tests": 16,
        "batch": 8,
        "steps": 3,
        "learning_rate": 4e-3,
        "seeds": 1,
    },
    full={
        "star_graph": {"nodes": 9, "paths": 2, "longest_path": 4, "length": 11},
        "zebra_puzzle": {"attributes": 2, "clues": 6, "length": 24},
        "width": 64,
        "depth": 2,
        "texts": 40000,
        "tests": 400,
        "batch": 64,
        "steps": 700,
        "learning_rate": 4e-3,
        "seeds": 1,
    },
)
