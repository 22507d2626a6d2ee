"""Planning-guided decoding: a tree search that runs tests finds more right programs than other decoding (2023)."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._finetuning import tune
from seqmix.claims._list_programs import IDS, TOKENS, Judge, batch, problems

USUAL, BEAMS = "beam search, the likeliest", "beam search, the best by public tests"
SAMPLES, PLANS, SHORT = "sampling", "planning", "planning for short code"
READ = 0.5  # share of tokens that the memory leaves to read, at most
EQUAL = 0.05  # by which pass rates may differ


def measure(run: Run) -> list[Finding]:
    found: list[dict[str, Any]] = []
    for seed in run["seeds"]:
        found += run.remember(f"programs, seed {seed}", partial(programs, run, seed))
    return [
        above(found, USUAL, "Planning solves more held-out problems than beam search does."),
        above(
            found,
            SAMPLES,
            "It solves more than sampling and choosing by the same tests does.",
        ),
        above(found, BEAMS, "It solves more than choosing among all beams by the same tests does."),
        shared(found),
        shorter(found),
    ]


def trained(run: Run, seed: int) -> Any:
    from seqmix.models.hf import create

    shape = {"shown": run["shown"], "hidden": 1}
    count = run["steps"] * run["batch"]
    some = problems(count, seed=seed, statements=(1, 2), held_out=False, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create(
            run["layout"], width=run["width"], heads=run["heads"], vocabulary=len(TOKENS)
        )
    batches = [batch(some[i : i + run["batch"]]) for i in range(0, count, run["batch"])]
    tune(model, batches, run["learning rate"])
    return model.eval()


def programs(run: Run, seed: int) -> list[dict[str, Any]]:
    """For every held-out problem, what each way of decoding brings with as many programs."""
    from seqmix.generate import Beams, Sampling
    from seqmix.generate._memory import Memory
    from seqmix.generate._method import Task
    from seqmix.generate._reader import reader_of
    from seqmix.generate.planning import Planning
    from seqmix.generate.sandbox import Sandbox

    reader = reader_of(trained(run, seed))
    tests = problems(
        run["problems"],
        seed=1000 + seed,
        statements=(2, 2),
        shown=run["shown"],
        hidden=run["hidden"],
        held_out=True,
    )
    count, width, found = run["programs"], run["candidates"], []
    with Sandbox(seconds=1.0) as sandbox, torch.inference_mode():
        for one in tests:
            judge = Judge(sandbox, one)

            def brief(ids: list[int], judge: Judge = judge) -> float:
                return judge.public(ids) + run["brevity"] * (1 - len(ids) / run["new tokens"])

            task = Task(
                prompt=torch.tensor([one.prompt()]),
                new_tokens=run["new tokens"],
                ends=frozenset([IDS[""]]),
                texts=count,
                seed=seed,
            )
            memory = Memory(reader)
            planned = Planning(reward=judge.public, rollouts=count, candidates=width).search(
                memory, task
            )
            texts = {
                BEAMS: Beams(width=count).decode(reader, task),
                SAMPLES: Sampling(temperature=run["temperature"]).decode(reader, task),
                PLANS: [each.text for each in planned],
                SHORT: Planning(reward=brief, rollouts=count, candidates=width).decode(
                    reader, task
                ),
            }
            # Of all texts the likeliest of those that pass most public tests, the same for every way.
            chosen = {
                name: max(each, key=lambda t: (judge.public(t.ids), t.log_probability)).ids
                for name, each in texts.items()
            }
            chosen[USUAL] = texts[BEAMS][0].ids
            chosen[SHORT] = texts[SHORT][0].ids
            found.append(
                {
                    "solved": {name: judge.hidden(ids) for name, ids in chosen.items()},
                    "public": {name: judge.public(ids) for name, ids in chosen.items()},
                    "tokens": {name: len(ids) for name, ids in chosen.items()},
                    "different texts": {
                        name: len({tuple(t.ids) for t in each}) for name, each in texts.items()
                    },
                    "read": memory.tokens / memory.asked,
                }
            )
    return found


def mean(found: list[dict[str, Any]], what: str) -> dict[str, float]:
    return {name: statistics.fmean(one[what][name] for one in found) for name in found[0][what]}


def above(found: list[dict[str, Any]], other: str, statement: str) -> Finding:
    gains = [one["solved"][PLANS] - one["solved"][other] for one in found]
    return Finding(
        statement,
        f"the share of problems whose hidden tests all pass, above that of {other}, with as many programs decoded: by "
        "two standard errors of the difference over problems",
        {
            "problems": len(found),
            "solved": mean(found, "solved"),
            "public tests passed": mean(found, "public"),
            "different programs": mean(found, "different texts"),
            "gain": statistics.fmean(gains),
        },
        compare_groups(gains, [0.0]),
    )


def shared(found: list[dict[str, Any]]) -> Finding:
    shares = [one["read"] for one in found]
    return Finding(
        "Sharing what was read between the search and the model makes planning cheaper.",
        f"tokens that the model reads: at most {READ} of those that search and continuations ask for, on average",
        {"share of tokens read": statistics.fmean(shares), "largest": max(shares)},
        "reproduced" if statistics.fmean(shares) <= READ else "not reproduced",
    )


def shorter(found: list[dict[str, Any]]) -> Finding:
    """Of problems that both rewards solve, as those of one only differ in what they compare."""
    both = [one for one in found if one["solved"][PLANS] and one["solved"][SHORT]]
    saved = [float(one["tokens"][PLANS] - one["tokens"][SHORT]) for one in both]
    solved = mean(found, "solved")
    kept = solved[SHORT] >= solved[PLANS] - EQUAL
    return Finding(
        "A reward that also favours short code gives shorter programs.",
        f"of problems solved with both rewards: fewer tokens by two standard errors over problems, while the share of "
        f"problems solved falls by at most {EQUAL}",
        {
            "problems solved by both": len(both),
            "tokens saved": statistics.fmean(saved) if saved else 0.0,
            "solved": {name: solved[name] for name in (PLANS, SHORT)},
        },
        compare_groups(saved, [0.0]) if kept and len(saved) > 1 else "not reproduced",
    )


CLAIM = Claim(
    title="Planning with Large Language Models for Code Generation",
    paper="arXiv:2303.05510",
    claimed="A tree search over tokens, guided by the model's probabilities and by how many public tests the programs "
    "that it completes pass, finds programs that pass more hidden tests than beam search, and than sampling and "
    "choosing by the same tests, with as many programs generated; other rewards control other properties. Here: a "
    "model of 0.4 M parameters trained on programs of one or two statements on lists, where the paper takes models "
    "of 1.5 B and more and problems of coding competitions.",
    where="abstract; section 4.1, table 1 and figure 4; section 4.4 (concise code)",
    measure=measure,
    quick={
        "layout": "2x[attention]",
        "width": 16,
        "heads": 2,
        "steps": 3,
        "batch": 4,
        "learning rate": 3e-3,
        "seeds": [0],
        "problems": 2,
        "shown": 2,
        "hidden": 2,
        "programs": 4,
        "candidates": 3,
        "temperature": 1.0,
        "new tokens": 6,
        "brevity": 0.1,
    },
    full={
        "layout": "3x[attention]",
        "width": 96,
        "heads": 4,
        "steps": 700,
        "batch": 32,
        "learning rate": 2e-3,
        "seeds": [0],
        "problems": 100,
        "shown": 3,
        "hidden": 6,
        "programs": 16,
        "candidates": 8,  # as many as there are constants
        "temperature": 1.5,  # the best of 0.7, 1 and 1.5 for other problems
        "new tokens": 10,
        "brevity": 0.1,
    },
)
