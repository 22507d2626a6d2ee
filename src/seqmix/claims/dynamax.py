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
from seqmix.claims._training import QUICK_TEXT
from seqmix.models.backbone import ModelSpec
from seqmix.models.hf import SeqmixForCausalLM

if TYPE_CHECKING:
    from seqmix.generate._reader import Reader
    from seqmix.generate.early_exit import EarlyExits

THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
DEARER = 1.02  # loss, against the whole model's
SAVED = 0.2  # of the weights that a byte is multiplied with in blocks and exits
AGREE = 0.9  # of the likeliest tokens
NEVER = "exits, deep blocks never see skipped bytes"
Point = dict[str, float]


def measure(run: Run) -> list[Finding]:
    curves = {
        base: {
            kind: [
                run.remember(f"{base}, {kind}, seed {seed}", partial(curve, run, base, kind, seed))
                for seed in range(run["seeds"])
            ]
            for kind in run["exits"]
        }
        for base in run["bases"]
    }
    used = {
        base: run.remember(f"{base}, decoding", partial(decoding, run, base))
        for base in run["bases"]
    }
    return [
        saves(curves),
        consistent(curves),
        mamba_decides_better(curves),
        never_seen(used),
        faster(used),
    ]


def windows(run: Run) -> tuple[Tensor, Tensor]:
    """Windows [N, T] to train on, and held-out ones."""
    train, held_out = byte_windows(run["data"], run["length"])
    return train, spread(held_out, run["rows"])


def base_model(run: Run, base: str) -> SeqmixForCausalLM:
    """A language model of bytes, trained here; its weights are kept as long as the process."""
    from seqmix.train.language import new_model
    from seqmix.train.loop import run as train
    from seqmix.train.plan import Plan

    if base not in _MODELS:
        rows, _ = windows(run)
        spec = ModelSpec(
            layout=run["bases"][base], width=run["width"], heads=4, vocabulary=VOCABULARY
        )
        model = new_model(spec, 0)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))

        def draw(index: int) -> dict[str, Tensor]:
            chosen = order[
                torch.arange(index * run["batch"], (index + 1) * run["batch"]) % len(order)
            ]
            return {"input_ids": rows[chosen], "labels": rows[chosen]}

        plan = Plan(
            steps=run["steps"],
            tokens_per_step=run["batch"] * run["length"],
            learning_rate=run["learning_rate"],
            progress=False,
        )
        train(model, draw, plan)
        _MODELS[base] = model.eval()
    return _MODELS[base]


_MODELS: dict[str, SeqmixForCausalLM] = {}


def exits_of(run: Run, base: str, kind: str, seed: int) -> EarlyExits:
    from seqmix.generate.early_exit import fit_exits

    model, (rows, _) = base_model(run, base), windows(run)
    generator = torch.Generator().manual_seed(100 + seed)
    batches = [
        rows[torch.randint(len(rows), (run["batch"],), generator=generator)]
        for _ in range(run["exit_steps"])
    ]
    last = len(model.model.backbone.blocks)
    depths = [round(share * last) for share in run["depths"]]
    return fit_exits(model, batches, depths=depths, layout=run["exits"][kind], seed=seed)


def curve(run: Run, base: str, kind: str, seed: int) -> dict[str, Any]:
    """`trade_off` of exits that are trained here."""
    return trade_off(base_model(run, base), exits_of(run, base, kind, seed), windows(run)[1])


@torch.no_grad()
def trade_off(model: SeqmixForCausalLM, exits: EarlyExits, held_out: Tensor) -> dict[str, Any]:
    """For every threshold: computation, loss and agreement on held-out text, of states that caught up.

    Computation is the weights of the blocks and exits that a byte meets, as a share of those of all blocks.
    """
    hidden, features = exits.hidden(model, held_out)
    whole = model.model.logits(features).float().log_softmax(-1)
    blocks = [size(block) for block in model.model.backbone.blocks]
    found = [(each(h)[:2]) for each, h in zip(exits.exits, hidden, strict=True)]
    logs = [model.model.logits(f).float().log_softmax(-1) for f, _ in found] + [whole]
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


def decoding(run: Run, base: str) -> dict[str, Any]:
    """Reading held-out text byte by byte after a prompt, at the threshold of `cheapest`: loss, blocks and time."""
    model, kind = base_model(run, base), next(iter(run["exits"]))
    exits, (_, held_out) = exits_of(run, base, kind, 0), windows(run)
    point = cheapest(trade_off(model, exits, held_out)) or {"threshold": THRESHOLDS[-1]}
    with torch.inference_mode():
        return {"threshold": point["threshold"], **readings(run, model, exits, point["threshold"])}


def readings(
    run: Run, model: SeqmixForCausalLM, exits: EarlyExits, threshold: float
) -> dict[str, Any]:
    """What reading costs with the whole model, with exits, and with deep blocks that never see skipped bytes."""
    from seqmix.generate._reader import reader_of
    from seqmix.generate.early_exit import EarlyExitReader

    readers: dict[str, Reader] = {"whole model": reader_of(model)}
    for name, catch_up in (("exits", True), (NEVER, False)):
        readers[name] = EarlyExitReader(model, exits, threshold=threshold, catch_up=catch_up)
    prompt, texts = run["length"] // 2, windows(run)[1][: run["texts"]]

    def read(reader: Reader, text: Tensor) -> float:
        state, total = reader.read(text[None, :prompt]).state, 0.0
        for place in range(prompt, len(text) - 1):
            logits, _, state = reader.read(text[None, place : place + 1], state)
            total -= float(logits[0, -1].float().log_softmax(-1)[text[place + 1]])
        return total / (len(text) - 1 - prompt)

    found: dict[str, Any] = {}
    for name, reader in readers.items():
        losses = [read(reader, text) for text in texts]
        found[name] = {"loss": statistics.fmean(losses)}
        if isinstance(reader, EarlyExitReader):
            all_blocks = reader.tally.tokens * len(model.model.backbone.blocks)
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
