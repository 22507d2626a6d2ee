"""STree: trees of guesses are read in one pass by recurrent and hybrid models too (Wu et al. 2025)."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._bytes import VOCABULARY, byte_windows, loss_on, spread
from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._speculation import decoded, same_texts
from seqmix.claims._timing import median_milliseconds
from seqmix.claims._training import QUICK_TEXT, language_model
from seqmix.core.state import State
from seqmix.generate._reader import Reader, Reading, reader_of

UNROLLED, CHAIN, TREE = "unrolled tree", "chain", "tree"
KINDS = (
    "greedy",
    "drawn",
)  # texts; those drawn are no loops, as greedy ones of small models often are


class Unrolled(Reader):
    """Reads the paths of a tree as texts of their own, as the general form does."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def read(self, ids: Tensor, state: State = None, *, keep: int = 1) -> Reading:
        return self.reader.read(ids, state, keep=keep)

    def select(self, state: State, rows: list[int]) -> State:
        return self.reader.select(state, rows)


def measure(run: Run) -> list[Finding]:
    found = run.remember("decoding", lambda: studied(run))
    passes = run.remember("passes", lambda: reading(run))
    return [
        same(found),
        *(more_tokens(found, kind) for kind in KINDS),
        *(faster(found, kind) for kind in KINDS),
        one_pass(found, passes),
    ]


def studied(run: Run) -> dict[str, Any]:
    from seqmix.generate import (
        DraftModel,
        Sampling,
        Shape,
        Speculative,
        SpeculativeTree,
        TreeModel,
    )

    rows, held_out = byte_windows(run["data"], run["length"])
    options = {"vocabulary": VOCABULARY, "batch": run["batch"], "seed": 0}
    model = language_model(
        run["layout"],
        rows,
        width=run["width"],
        steps=run["steps"],
        learning_rate=run["learning_rate"],
        **options,
    )
    small = language_model(
        run["drafter"],
        rows,
        width=run["drafter width"],
        steps=run["drafter steps"],
        learning_rate=run["drafter learning_rate"],
        **options,
    )
    prompts = [row[None, : run["prompt"]] for row in spread(held_out, run["prompts"])]
    found = {
        "losses": [loss_on(each, spread(held_out, run["rows"])) for each in (model, small)],
        "parameters": [each.num_parameters() for each in (model, small)],
    }
    for kind, sampling in (("greedy", Sampling(temperature=0.0)), ("drawn", Sampling())):
        depth = run["depth"]
        one, wide = (
            TreeModel(small, Shape(depth=depth, width=width, nodes=2 * depth))
            for width in (1, run["breadth"])
        )
        chain = Speculative(drafter=DraftModel(small), guesses=depth, sampling=sampling)
        narrow = SpeculativeTree(drafter=one, sampling=sampling)
        tree = SpeculativeTree(drafter=wide, sampling=sampling)
        ways = {
            "plain": (model, sampling),
            CHAIN: (model, chain),
            f"{CHAIN}, by the code of trees": (model, narrow),
            TREE: (model, tree),
            UNROLLED: (Unrolled(reader_of(model)), tree),
        }
        found[kind] = decoded(ways, prompts, new_tokens=run["new tokens"], repeats=run["repeats"])
    return found


@torch.inference_mode()
def reading(run: Run) -> dict[str, dict[str, float]]:
    """Milliseconds to read random trees after a text, in one pass and unrolled."""
    from seqmix.core.tree import Tree
    from seqmix.models.hf import create

    reader = reader_of(create(run["layout"], width=run["width"], vocabulary=VOCABULARY).eval())
    numbers, generator = random.Random(0), torch.Generator().manual_seed(0)
    state = reader.read(torch.randint(0, 256, (1, run["prompt"]), generator=generator)).state
    found = {}
    for nodes in run["tree sizes"]:
        tree = Tree([numbers.randrange(-1, node) for node in range(nodes)])
        ids = torch.randint(0, 256, (1, 2 + nodes), generator=generator)
        calls = {
            "one pass": lambda tree=tree, ids=ids: reader.read_tree(ids, state, tree),
            "unrolled": lambda tree=tree, ids=ids: Unrolled(reader).read_tree(ids, state, tree),
        }
        found[str(nodes)] = median_milliseconds(calls, run["passes"])
    return found


def same(found: dict[str, Any]) -> Finding:
    exact = {
        kind: {
            name: way
            for name, way in found[kind].items()
            if kind == "greedy" or name != CHAIN  # drawn guesses take random numbers of their own
        }
        for kind in KINDS
    }
    return same_texts("Decoding with trees gives the text of plain decoding.", exact)


def more_tokens(found: dict[str, Any], kind: str) -> Finding:
    tokens = {name: way["tokens per check"] for name, way in found[kind].items() if name != "plain"}
    means = {name: sum(each) / len(each) for name, each in tokens.items()}
    best = max((name for name in tokens if name.startswith(CHAIN)), key=lambda name: means[name])
    gains = [a - b for a, b in zip(tokens[TREE], tokens[best], strict=True)]
    return Finding(
        f"A tree gives more tokens per check than a chain as deep, by the same drafter ({kind} texts).",
        "above the better chain's by two standard errors of the difference over prompts",
        {"mean": means, "by prompt": tokens},
        compare_groups(gains, [0.0]),
    )


def faster(found: dict[str, Any], kind: str) -> Finding:
    times = {name: way["milliseconds per token"] for name, way in found[kind].items()}
    chain = min(time for name, time in times.items() if name.startswith(CHAIN))
    return Finding(
        f"Decoding with trees is faster than with chains, and than plain decoding ({kind} texts).",
        "median milliseconds per token below those of the faster chain and of plain decoding",
        {
            "speed-up over chains": chain / times[TREE],
            "speed-up over plain decoding": times["plain"] / times[TREE],
            "milliseconds per token": times,
        },
        "reproduced" if times[TREE] < min(chain, times["plain"]) else "not reproduced",
    )


def one_pass(found: dict[str, Any], passes: dict[str, Any]) -> Finding:
    decoding = {
        kind: found[kind][UNROLLED]["milliseconds per token"]
        / found[kind][TREE]["milliseconds per token"]
        for kind in KINDS
    }
    ratios = {nodes: times["unrolled"] / times["one pass"] for nodes, times in passes.items()}
    first, *_, last = ratios.values()
    return Finding(
        "Reading a tree in one pass is faster than reading its paths, the more so the larger it is.",
        "time of unrolled trees over that of one pass: above 1 in decoding and for random trees, and more for the "
        "largest of them than for the smallest",
        {"decoding": decoding, "random trees": ratios, "milliseconds": passes},
        "reproduced" if min([*decoding.values(), first]) > 1 and last > first else "not reproduced",
    )


CLAIM = Claim(
    title="STree: Speculative Tree Decoding for Hybrid State-Space Models",
    paper="arXiv:2505.14969",
    claimed="Accumulated transitions let state space models and hybrids read a tree of guesses in one pass, exactly, "
    "at little more cost than a chain; so speculative decoding with trees beats that with chains. Here: a hybrid of 4 "
    "M parameters and a drafter of 0.1 M on bytes, on a CPU, where the paper has models of 2.7 to 8 B on a GPU.",
    where="abstract; tables 1 (sizes), 2 (against trees read as their paths) and 3 (against chains)",
    measure=measure,
    quick={
        "data": QUICK_TEXT,
        "length": 32,
        "layout": "mamba2, attention",
        "width": 16,
        "batch": 4,
        "steps": 2,
        "learning_rate": 2e-3,
        "drafter": "mamba2",
        "drafter width": 16,
        "drafter steps": 2,
        "drafter learning_rate": 4e-3,
        "rows": 4,
        "prompt": 8,
        "prompts": 1,
        "new tokens": 4,
        "depth": 2,
        "breadth": 2,
        "tree sizes": [4, 8],
        "passes": 1,
        "repeats": 1,
    },
    full={
        "data": "shakespeare",
        "length": 64,
        "layout": "2x[mamba2(state_width=16), attention]",
        "width": 256,
        "batch": 8,
        "steps": 120,
        "learning_rate": 2e-3,
        "drafter": "mamba2(state_width=16)",
        "drafter width": 64,
        "drafter steps": 200,
        "drafter learning_rate": 4e-3,
        "rows": 64,
        "prompt": 32,
        "prompts": 5,
        "new tokens": 32,
        "depth": 3,
        "breadth": 3,
        "tree sizes": [8, 16, 32],
        "passes": 7,
        "repeats": 2,
    },
)
