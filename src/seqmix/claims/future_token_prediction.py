"""Future token prediction: states that have to say the next tokens, not one, are about the text (Walker 2024)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.claims._bytes import VOCABULARY
from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._classifier import FULL, QUICK, read_corpora
from seqmix.generate._reader import Reader, reader_of
from seqmix.generate.future_tokens import FutureTokenReader
from seqmix.models.backbone import ModelSpec
from seqmix.models.future_tokens import FutureTokenModel
from seqmix.objectives import OBJECTIVES

CLEAR = 2.0  # times chance, which an accuracy must exceed to say anything
KINDS = (
    "future",
    "next",
)  # what a model predicts: tokens ahead, or the next one alone (as a GPT does)
GRID, MOVES = (
    4,
    torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]),
)  # places per side; right, left, up, down
COLON, END = (GRID + len(MOVES) + i for i in range(2))
GIVEN = 5  # tokens of a problem: where a robot is, where it is to be, and a colon
LONGEST = 2 * (GRID - 1) + 1  # tokens of a program, its end included


def measure(run: Run) -> list[Finding]:
    seeds = range(run["seeds"])
    texts = [run.remember(f"texts, seed {s}", lambda s=s: on_texts(run, s)) for s in seeds]
    programs = [run.remember(f"programs, seed {s}", lambda s=s: on_programs(run, s)) for s in seeds]
    return [smoother(texts), topics(texts, len(run["corpora"])), coding(programs)]


def pair(
    run: Run, rows: Tensor, vocabulary: int, settings: Mapping[str, Any], seed: int
) -> dict[str, Reader]:
    """Both models, with as many parameters, trained on windows [N, T] with as many operations.

    A state is decoded at some places only; what that costs above the other model's steps, that one gets as steps.
    """
    from seqmix.models.hf import create
    from seqmix.train.objective import train_objective

    sizes = {"width": run["width"], "heads": run["heads"], "vocabulary": vocabulary}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ModelSpec(layout="attention", depth=run["depth"], **sizes)
        future: Any = FutureTokenModel(encoder, blocks=run["blocks"], pseudo=run["pseudo"])
        plain: Any = create(ModelSpec(layout="attention", depth=run["depth of the other"], **sizes))
    ahead = OBJECTIVES.get("future_tokens")
    objectives = {
        "future": ahead(ahead.Config(ahead=settings["ahead"], every=settings["every"])),
        "next": OBJECTIVES.get("causal")(),
    }
    models = {"future": future, "next": plain}
    work = {k: operations(models[k], objectives[k], rows[: settings["batch"]]) for k in KINDS}
    for kind, model in models.items():
        train_objective(
            model,
            rows,
            objectives[kind],
            steps=round(settings["steps"] * work["future"] / work[kind]),
            batch=settings["batch"],
            learning_rate=run["learning_rate"],
            seed=seed,
        )
        model.eval()
    return {"future": FutureTokenReader(future), "next": reader_of(plain)}


@torch.no_grad()
def operations(model: Any, objective: Any, rows: Tensor) -> int:
    """Floating-point operations of the loss of some windows."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        objective.loss(model, objective.inputs(rows, torch.Generator().manual_seed(0)))
    return counter.get_total_flops()


@torch.no_grad()
def on_texts(run: Run, seed: int) -> dict[str, Any]:
    """For both kinds: loss of the next byte, cosine of neighbours by text, and whether a probe knows the corpus."""
    passages = read_corpora(run)
    rows = passages.train.long()
    with torch.enable_grad():
        readers = pair(run, rows, VOCABULARY, run["texts"], seed)
    places = torch.linspace(0, len(rows) - 1, run["probed"]).long()
    found: dict[str, Any] = {}
    for kind, reader in readers.items():
        train, test = (
            torch.cat([reader.read(part, keep=0).features for part in ids.split(64)])
            for ids in (rows[places], passages.test)
        )
        logits = torch.cat([reader.read(part, keep=0).logits for part in passages.test.split(64)])
        centred = test - test.mean((0, 1))
        right = probe(train[:, -1], passages.train_works[places], test[:, -1], passages.test_works)
        found[kind] = {
            "loss": float(
                F.cross_entropy(logits[:, :-1].flatten(0, 1), passages.test[:, 1:].flatten())
            ),
            "cosine": neighbours(test),
            "cosine of centred states": statistics.fmean(neighbours(centred)),
            "right": right,
        }
    return found


def neighbours(states: Tensor) -> list[float]:
    """The mean cosine of each text's neighbouring states [N, T, D]."""
    return F.cosine_similarity(states[:, 1:], states[:, :-1], dim=-1).mean(1).tolist()


def probe(train: Tensor, labels: Tensor, test: Tensor, wanted: Tensor) -> list[int]:
    """Whether softmax regression on frozen states [N, D], each scaled alike, knows the label of each test state."""
    mean, deviation = train.mean(0), train.std(0)
    train, test = ((x - mean) / deviation for x in (train, test))
    layer = torch.nn.Linear(train.shape[1], int(labels.max()) + 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(layer(train), labels) + 1e-3 * layer.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return (layer(test).argmax(-1) == wanted).int().tolist()


def problems(count: int, padding: int, seed: int) -> Tensor:
    """Where a robot is and is to be, and a shortest program of moves in any order: tokens [N, T]."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for places in torch.randint(GRID, (count, 4), generator=draw):
        right, up = (places[2:] - places[:2]).tolist()
        moves = [int(right < 0)] * abs(right) + [2 + int(up < 0)] * abs(up)
        order = torch.randperm(len(moves), generator=draw).tolist()
        program = [GRID + moves[i] for i in order]
        ends = [END] * (LONGEST + padding - len(program))
        rows.append([*places.tolist(), COLON, *program, *ends])
    return torch.tensor(rows)


@torch.no_grad()
def on_programs(run: Run, seed: int) -> dict[str, list[int]]:
    """For both kinds: whether the program that is written for each new problem does what was asked."""
    settings = run["programs"]
    rows = problems(settings["problems"], settings["ahead"] - 1, seed=1 + 2 * seed)
    pairs = rows[:, : GIVEN - 1] @ GRID ** torch.arange(GIVEN - 1)
    held_out = pairs % settings["one in"] == seed  # no program for these is ever read
    asked = rows[held_out][: settings["tests"], :GIVEN]
    with torch.enable_grad():
        readers = pair(run, rows[~held_out], END + 2, settings, seed)
    return {kind: solved(reader, asked) for kind, reader in readers.items()}


def solved(reader: Reader, asked: Tensor) -> list[int]:
    """Whether the likeliest programs, moved through until their ends, lead to the places asked for, [N] of 0 and 1."""
    ids, state = asked, None
    place, over = asked[:, :2], torch.zeros(len(asked), dtype=torch.bool)
    for _ in range(LONGEST):
        logits, _, state = reader.read(ids, state)
        ids = logits[:, -1:].argmax(-1)
        over |= ids[:, 0] == END
        move = ids[:, 0] - GRID
        legal = (move >= 0) & (move < len(MOVES)) & ~over
        place = place + MOVES[move.clamp(0, len(MOVES) - 1)] * legal[:, None]
    return (over & (place == asked[:, 2:4]).all(1)).int().tolist()


Results = list[dict[str, Any]]


def pooled(found: Results, read: Callable[[Any], list[float]]) -> list[float]:
    """By item and seed, what predicting ahead adds to predicting the next token."""
    return [
        a - b for one in found for a, b in zip(read(one["future"]), read(one["next"]), strict=True)
    ]


def means(found: Results, read: Callable[[Any], list[float]]) -> dict[str, list[float]]:
    return {kind: [statistics.fmean(read(one[kind])) for one in found] for kind in KINDS}


def smoother(found: Results) -> Finding:
    gains = pooled(found, lambda one: one["cosine"])
    table = means(found, lambda one: one["cosine"])
    centred = {kind: [one[kind]["cosine of centred states"] for one in found] for kind in KINDS}
    return Finding(
        "State vectors change more smoothly along a text than the top layer of a model of the next token.",
        "mean cosine of neighbouring states on held-out text: higher, by two standard errors of the difference over "
        "texts",
        {"cosine": table, "with the mean state taken away": centred},
        compare_groups(gains, [0.0]),
    )


def topics(found: Results, corpora: int) -> Finding:
    table = means(found, lambda one: one["right"])
    clear = min(map(min, table.values())) > CLEAR / corpora
    return Finding(
        "The state after a passage says better what the text is about.",
        f"accuracy of a linear probe for the corpus: both above {CLEAR:g} times chance, and higher with states that "
        "predict ahead, by two standard errors of the difference over passages",
        {
            "accuracy": table,
            "chance": 1 / corpora,
            "loss of the next byte": {k: [one[k]["loss"] for one in found] for k in KINDS},
        },
        compare_groups(pooled(found, lambda one: one["right"]), [0.0]) if clear else "inconclusive",
    )


def coding(found: Results) -> Finding:
    return Finding(
        "On a toy problem of writing programs it does better.",
        "share of new problems that the written program solves, which takes a robot from one place of a grid to "
        "another: higher, by two standard errors of the difference over problems",
        means(found, lambda one: one),
        compare_groups(pooled(found, lambda one: one), [0.0]),
    )


SIZES = {"width": 64, "heads": 4, "depth": 2, "blocks": 1, "pseudo": 8, "depth of the other": 4}

CLAIM = Claim(
    title="Future Token Prediction -- Causal Language Modelling with Per-Token Semantic State Vector for Multi-Token "
    "Prediction",
    paper="arXiv:2410.18160",
    claimed="A model whose state vector per token has to yield the next several tokens, through a small decoder, has "
    "states that vary smoothly along a text and say more of its topic than those of a GPT, and writes better programs "
    "in a toy problem. Here: models of 0.2 M parameters on bytes of five corpora and on programs that move a robot, "
    "against one of the next token with as many parameters and operations in training; the paper's have 12 layers and "
    "read web text.",
    where="abstract; results on cosine similarity, text classification and the coding problem",
    measure=measure,
    quick={
        "corpora": QUICK["corpora"],
        "length": 16,
        "tests": 32,
        "probed": 64,
        "texts": {"steps": 2, "batch": 4, "ahead": 4, "every": 4},
        "programs": {
            "problems": 64,
            "one in": 4,
            "tests": 16,
            "steps": 2,
            "batch": 4,
            "ahead": 4,
            "every": 2,
        },
        **SIZES,
        "width": 16,
        "learning_rate": 3e-3,
        "seeds": 1,
    },
    full={
        "corpora": FULL["corpora"],
        "length": 48,
        "tests": 2000,
        "probed": 2000,
        "texts": {"steps": 200, "batch": 16, "ahead": 8, "every": 4},
        "programs": {
            "problems": 3000,
            "one in": 7,
            "tests": 400,
            "steps": 250,
            "batch": 32,
            "ahead": 4,
            "every": 2,
        },
        **SIZES,
        "learning_rate": 3e-3,
        "seeds": 1,
    },
)
