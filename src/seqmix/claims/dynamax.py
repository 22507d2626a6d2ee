"""DYNAMAX: early exits in Transformers and Mamba, with Mamba as what decides about them (Nogales et al. 2025)."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqmix.claims._bytes import VOCABULARY, byte_windows, spread
from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._timing import median_milliseconds
from seqmix.claims._training import QUICK_TEXT, language_model

if TYPE_CHECKING:
    from seqmix.generate._reader import Reader
    from seqmix.models.early_exit import EarlyExits

THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
DEARER = 1.02  # loss, against the whole model's
SAVED = 0.2  # of the weights that a byte is multiplied with in blocks and exits
AGREE = 0.9  # of the likeliest tokens
NEVER = "exits, deep blocks never see skipped bytes"
Point = dict[str, float]


def measure(run: Run) -> list[Finding]:
    found = {base: run.remember(base, partial(studied, run, base)) for base in run["bases"]}
    curves = {base: each["curves"] for base, each in found.items()}
    used = {base: each["decoding"] for base, each in found.items()}
    return [
        saves(curves),
        consistent(curves),
        mamba_decides_better(curves),
        never_seen(used),
        faster(used),
    ]


def studied(run: Run, base: str) -> dict[str, Any]:
    """A model trained here, `trade_off` of exits of every kind and seed, and `readings` with the first of them."""
    from seqmix.models.early_exit import EarlyExits
    from seqmix.train.early_exit import train_exits

    windows, held_out = byte_windows(run["data"], run["length"])
    held_out = spread(held_out, run["rows"])
    options = {"batch": run["batch"], "learning_rate": run["learning_rate"]}
    shape = {"width": run["width"], "vocabulary": VOCABULARY}
    layout = run["bases"][base]
    model = language_model(layout, windows, seed=0, steps=run["steps"], **shape, **options)
    last = len(model.model.backbone.blocks)
    depths = [round(share * last) for share in run["depths"]]
    curves: dict[str, list[Any]] = {kind: [] for kind in run["exits"]}
    decoding: dict[str, Any] = {}
    for kind, layout in run["exits"].items():
        for seed in range(run["seeds"]):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                exits = EarlyExits(model, depths, layout)
            train_exits(exits, windows, steps=run["exit_steps"], seed=100 + seed, **options)
            curves[kind].append(trade_off(exits.eval(), held_out))
            if not decoding:
                point = cheapest(curves[kind][0]) or {"threshold": THRESHOLDS[-1]}
                decoding = readings(run, exits, point["threshold"], held_out[: run["texts"]])
    return {"curves": curves, "decoding": decoding}


@torch.no_grad()
def trade_off(exits: EarlyExits, held_out: Tensor) -> dict[str, Any]:
    """For every threshold: computation, loss and agreement on held-out text, of states that caught up.

    Computation is the weights of the blocks and exits that a byte meets, as a share of those of all blocks.
    """
    inside = exits.known[0].model
    hidden, features = exits.hidden(held_out)
    whole = inside.logits(features).float().log_softmax(-1)
    blocks = [size(block) for block in inside.backbone.blocks]
    found = [(each(h)[:2]) for each, h in zip(exits.exits, hidden, strict=True)]
    logs = [inside.logits(f).float().log_softmax(-1) for f, _ in found] + [whole]
    sure = [c.sigmoid() for _, c in found]
    points = []
    for threshold in THRESHOLDS:
        met = sum(blocks) + sum(size(each) for each in exits.exits)
        chosen, weights = whole, torch.full_like(sure[0], met)
        for place in reversed(range(len(exits.exits))):
            leaves = sure[place] >= threshold
            chosen = torch.where(leaves.unsqueeze(-1), logs[place], chosen)
            met = sum(blocks[: exits.depths[place]]) + sum(map(size, exits.exits[: place + 1]))
            weights = torch.where(leaves, float(met), weights)
        same = chosen.argmax(-1) == whole.argmax(-1)
        points.append(
            {
                "threshold": threshold,
                "computation": float(weights.mean()) / sum(blocks),
                "loss": loss_of(chosen, held_out),
                "agrees": float(same.float().mean()),
            }
        )
    return {
        "parameters of an exit": size(exits.exits[0]),
        "parameters of all blocks": sum(blocks),
        "loss of the whole model": loss_of(whole, held_out),
        "loss of each exit": [loss_of(log, held_out) for log in logs[:-1]],
        "points": points,
    }


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def loss_of(logs: Tensor, ids: Tensor) -> float:
    """Nats per byte of log-probabilities [N, T, V]."""
    return -float(logs[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1)).mean())


def cheapest(found: dict[str, Any]) -> Point | None:
    """The threshold with the least computation at a loss of at most `DEARER` times the whole model's."""
    limit = DEARER * found["loss of the whole model"]
    fits = [point for point in found["points"] if point["loss"] <= limit]
    return min(fits, key=lambda point: point["computation"]) if fits else None


def saved(found: dict[str, Any]) -> float:
    """Share of the computation that is saved at that threshold; none where no threshold fits."""
    point = cheapest(found)
    return 0.0 if point is None else 1 - point["computation"]


@torch.inference_mode()
def readings(run: Run, exits: EarlyExits, threshold: float, texts: Tensor) -> dict[str, Any]:
    """Reading texts byte by byte after a prompt, with the whole model, with exits, and with deep blocks that never see
    skipped bytes: loss, blocks and time."""
    from seqmix.generate._reader import reader_of
    from seqmix.generate.early_exit import EarlyExitReader

    readers: dict[str, Reader] = {"whole model": reader_of(exits.known[0])}
    for name, catch_up in (("exits", True), (NEVER, False)):
        readers[name] = EarlyExitReader(exits, threshold=threshold, catch_up=catch_up)
    prompt = run["length"] // 2

    def read(reader: Reader, text: Tensor) -> float:
        state, total = reader.read(text[None, :prompt]).state, 0.0
        for place in range(prompt, len(text) - 1):
            logits, _, state = reader.read(text[None, place : place + 1], state)
            total -= float(logits[0, -1].float().log_softmax(-1)[text[place + 1]])
        return total / (len(text) - 1 - prompt)

    found: dict[str, Any] = {"threshold": threshold}
    for name, reader in readers.items():
        losses = [read(reader, text) for text in texts]
        found[name] = {"loss": statistics.fmean(losses)}
        if isinstance(reader, EarlyExitReader):
            all_blocks = reader.tally.tokens * len(reader.inside.backbone.blocks)
            found[name]["blocks"] = reader.tally.blocks / all_blocks
            found[name]["calls of blocks"] = reader.tally.calls / all_blocks
    times = median_milliseconds(
        {name: lambda r=reader: read(r, texts[0]) for name, reader in readers.items()},
        run["repeats"],
    )
    for name, time in times.items():
        found[name]["milliseconds per byte"] = time / (len(texts[0]) - 1 - prompt)
    return found


def saves(curves: dict[str, Any]) -> Finding:
    best = {
        base: [saved(found) for found in next(iter(kinds.values()))]
        for base, kinds in curves.items()
    }
    return Finding(
        "Early exits save computation at little cost in quality, in a Transformer and in Mamba.",
        f"at some threshold, on average over seeds: at least {SAVED:.0%} of the weights that a byte meets "
        f"(exits counted) saved at a loss of at most {DEARER} times the whole model's, for both",
        {"saved, exits of Mamba": best, "curves": curves},
        "reproduced"
        if all(statistics.fmean(values) >= SAVED for values in best.values())
        else "not reproduced",
    )


def consistent(curves: dict[str, Any]) -> Finding:
    agrees = {
        base: [
            point["agrees"] for found in next(iter(kinds.values())) if (point := cheapest(found))
        ]
        for base, kinds in curves.items()
    }
    return Finding(
        "What exits say is consistent with the whole model.",
        f"at that threshold the likeliest byte is the whole model's for at least {AGREE:.0%} of bytes, for both",
        agrees,
        "reproduced"
        if all(values and statistics.fmean(values) >= AGREE for values in agrees.values())
        else "not reproduced",
    )


def mamba_decides_better(curves: dict[str, Any]) -> Finding:
    by_base = {
        base: {kind: [saved(found) for found in kinds[kind]] for kind in kinds}
        for base, kinds in curves.items()
    }
    ours, other = (
        [value for kinds in by_base.values() for value in list(kinds.values())[number]]
        for number in (0, 1)
    )
    return Finding(
        "A Mamba block, which sees what came before, is a better exit than a perceptron of its size.",
        f"computation saved at {DEARER} times the loss: more, beyond two standard errors over models and seeds",
        by_base,
        compare_groups(ours, other),
    )


def never_seen(used: dict[str, Any]) -> Finding:
    whole, late, never = (
        {base: found[name]["loss"] for base, found in used.items()}
        for name in ("whole model", "exits", NEVER)
    )
    return Finding(
        "Mamba's deep blocks can leave skipped tokens out of their states, as a Transformer's cannot.",
        "rise of the loss over the whole model's, when deep blocks never see skipped bytes: smaller for Mamba than for "
        f"the Transformer, and at most {DEARER} times the whole model's",
        {"whole model": whole, "caught up": late, "never seen": never},
        "reproduced"
        if never["Mamba"] - whole["Mamba"] < never["Transformer"] - whole["Transformer"]
        and never["Mamba"] <= DEARER * whole["Mamba"]
        else "not reproduced",
    )


def faster(used: dict[str, Any]) -> Finding:
    ratio = {
        base: found["whole model"]["milliseconds per byte"]
        / found["exits"]["milliseconds per byte"]
        for base, found in used.items()
    }
    return Finding(
        "Exits make decoding faster, with states that are those of the whole model.",
        "time per byte at that threshold: below the whole model's, for both",
        {"times as fast": ratio, "decoding": used},
        "reproduced" if min(ratio.values()) > 1 else "not reproduced",
    )


CLAIM = Claim(
    title="DYNAMAX: Dynamic computing for Transformers and Mamba based architectures",
    paper="arXiv:2504.20922",
    claimed="Exits after some layers save computation in decoder-only Transformers and in Mamba at little loss of "
    "quality, and a small Mamba is a good classifier of when to exit, for both. Here: models of about 1.6 M parameters "
    "of bytes of Python code, trained here, where the paper takes Mistral 7B and Codestral Mamba 7B on questions; what "
    "the exits are compared with, the thresholds and the catching up of deep blocks are ours.",
    where="abstract",
    measure=measure,
    quick={
        "data": QUICK_TEXT,
        "bases": {"Transformer": "3x[attention]", "Mamba": "3x[mamba]"},
        "exits": {"Mamba": "mamba/none", "perceptron": "none/mlp(hidden=32)"},
        "width": 16,
        "depths": [0.34, 0.67],
        "length": 16,
        "batch": 4,
        "steps": 4,
        "exit_steps": 3,
        "learning_rate": 3e-3,
        "rows": 2,
        "texts": 1,
        "repeats": 1,
        "seeds": 1,
    },
    full={
        "data": "python_code",
        "bases": {"Transformer": "8x[attention]", "Mamba": "16x[mamba/none]"},
        "exits": {"Mamba": "mamba(expansion=1)/none", "perceptron": "none/mlp(hidden=213)"},
        "width": 128,
        "depths": [0.25, 0.5, 0.75],
        "length": 256,
        "batch": 8,
        "steps": 200,
        "exit_steps": 50,
        "learning_rate": 3e-3,
        "rows": 16,
        "texts": 3,
        "repeats": 3,
        "seeds": 2,
    },
)
