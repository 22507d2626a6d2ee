"""SliceGPT: the residual stream turned to its principal components and cut (Ashkboos et al. 2024)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._timing import median_milliseconds

EXACT = {"float64, tiny": 1e-9, "float32": 1e-4}  # relative error of the logits after a turn alone
RETAINED = 0.9  # of the quality: the abstract's figure for its smallest model, Phi-2
FASTER = 1.05
COMPUTE = 0.64  # of the whole model's, in the abstract, for Llama-2 70B on several processors
STORED = 0.8  # of the whole model's parameters: the paper's 25% with a margin


def measure(run: Run) -> list[Finding]:
    model, calibration, held_out = prepared(run)
    small, letters, _ = tiny()
    errors = {
        "float64, tiny": run.remember("turn, tiny", lambda: turn_error(small, letters)),
        "float32": run.remember("turn", lambda: turn_error(model.float(), calibration)),
    }
    results = {"whole": run.remember("whole", lambda: quality(model, held_out))}
    cut = run.remember("slice", lambda: sliced(run, model, calibration, held_out))
    results["slice"] = cut["quality"]
    saved = results["whole"]["FLOPs per token"] - results["slice"]["FLOPs per token"]
    for name in ("blocks", "truncated SVD"):
        work = partial(rival, run, name, model, saved, calibration, held_out)
        results[name] = run.remember(name, work)
    return findings(run, errors, results, cut["milliseconds"])


def prepared(run: Run) -> tuple[Any, Any, Tensor]:
    """The model, the calibration text, and held-out windows [N, T] of other works of the same author."""
    from seqmix.compress import Calibration
    from seqmix.convert.hub import to_seqmix
    from seqmix.data.text import Corpus, read_text
    from seqmix.models.pretrained import load

    if run["model"] == "tiny":
        return tiny()
    source, tokenizer = load(run["model"])
    assert tokenizer is not None
    documents = read_text(run["data"]).documents
    parts = [
        Calibration.of(Corpus(name, part), tokenizer, length=run["length"], windows=windows)
        for name, part, windows in (
            ("calibration", documents[:8], run["tokens"] // run["length"]),
            ("held out", documents[-4:], run["windows"]),
        )
    ]
    return to_seqmix(source), parts[0], parts[1].windows


def tiny() -> tuple[Any, Any, Tensor]:
    """A small random model in float64, whose norms have weights, and two parts of a text."""
    from seqmix.compress import Calibration
    from seqmix.models.hf import create

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create("4x[attention]", width=32).double().eval()
        for name, parameter in model.named_parameters():
            if "norm.weight" in name:
                torch.nn.init.uniform_(parameter, 0.5, 2.0)
    rows = torch.tensor(list(Path(__file__).read_bytes()[:2048])).view(-1, 64)
    return model, Calibration(windows=rows[:24]), rows[24:]


def fit(name: str, model: Any, calibration: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model after a transform, and the notes of the transform."""
    from seqmix.compress import TRANSFORMS, Work

    work = Work()
    return TRANSFORMS.get(name)(**options).fit(model, calibration, work), work.notes


@torch.no_grad()
def turn_error(model: Any, calibration: Any) -> float:
    """The relative error of the logits after a turn of every stream, by any basis, without a cut."""
    window = calibration.windows[:1]
    turned, _ = fit("slice", model, calibration, remove=0.0, tokens=window.numel())
    before, after = (made(input_ids=window, use_cache=False).logits for made in (model, turned))
    return float((after - before).norm() / before.norm())


@torch.no_grad()
def quality(model: Any, windows: Tensor) -> dict[str, float]:
    """Loss in nats per token, the share of tokens that the most probable one hits, size and operations."""
    logits = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in windows])
    labels = windows[:, 1:].flatten()
    logits = logits[:, :-1].flatten(0, 1).float()
    length = windows.shape[1]
    return {
        "loss": float(F.cross_entropy(logits, labels)),
        "accuracy": float((logits.argmax(-1) == labels).float().mean()),
        "parameters": model.num_parameters(),
        "FLOPs per token": model.model.cost(length).flops / length,
    }


def sliced(run: Run, model: Any, calibration: Any, held_out: Tensor) -> dict[str, Any]:
    """Quality of the sliced model, and its times beside those of the whole one."""
    made, _ = fit("slice", model, calibration, remove=run["remove"], tokens=run["tokens"])
    times = speed(run, {"whole": model, "slice": made}, held_out)
    return {"quality": quality(made, held_out), "milliseconds": times}


def rival(
    run: Run, name: str, model: Any, saved: float, calibration: Any, held_out: Tensor
) -> dict[str, Any]:
    """Quality of another method that saves no more FLOPs per token than `saved`, the head's included."""
    if name == "blocks":
        blocks, length = model.model.backbone.blocks, held_out.shape[1]
        each = blocks[0].cost(length).flops / length
        share = saved // each / len(blocks)
        tokens = run["tokens for blocks"]
        made, notes = fit(name, model, calibration, remove=share, tokens=tokens)
        removed = [row["block"] for row in notes["removed"]]
        return quality(made, held_out) | {"blocks removed": removed}
    weights = sum(p.numel() for p in model.model.backbone.parameters() if p.ndim == 2)
    options = {"remove": saved / 2 / weights, "whiten": False, "tokens": run["length"]}
    made, _ = fit("low_rank", model, calibration, **options)
    return quality(made, held_out)


@torch.no_grad()
def speed(run: Run, models: dict[str, Any], held_out: Tensor) -> dict[str, dict[str, float]]:
    """Milliseconds to read one window, and to write one token after it."""
    ids = held_out[:1]
    reading, writing = {}, {}
    for name, model in models.items():
        inside = model.model
        _, state = inside(ids)
        reading[name] = partial(inside, ids)
        writing[name] = partial(inside, ids[:, -1:], state)
    return {
        "prefill": median_milliseconds(reading, run["rounds"]),
        "decode": median_milliseconds(writing, 4 * run["rounds"]),
    }


def findings(
    run: Run,
    errors: dict[str, float],
    results: dict[str, dict[str, Any]],
    times: dict[str, dict[str, float]],
) -> list[Finding]:
    whole, sliced = results["whole"], results["slice"]
    loss = {name: result["loss"] for name, result in results.items()}
    retained = sliced["accuracy"] / max(whole["accuracy"], 1e-9)
    speeds = {phase: t["whole"] / t["slice"] for phase, t in times.items()}
    shares = {phase: 1 / speed for phase, speed in speeds.items()}
    shares["FLOPs"] = sliced["FLOPs per token"] / whole["FLOPs per token"]
    stored = sliced["parameters"] / whole["parameters"]
    rows = [
        (
            "A turn of the residual stream alone leaves the outputs as they are.",
            f"relative errors of the logits at most {EXACT}",
            {"relative error": errors},
            all(errors[name] <= bound for name, bound in EXACT.items()),
        ),
        (
            f"With {run['remove']:.0%} of the width cut off, most of the quality stays, without training.",
            f"next-token accuracy on held-out text at least {RETAINED} of the whole model's",
            {"results": results, "retained": retained},
            retained >= RETAINED,
        ),
        (
            "It keeps more than removing whole blocks does.",
            "a lower held-out loss than a model with blocks removed that needs no fewer FLOPs",
            {"loss": loss, "blocks removed": results["blocks"]["blocks removed"]},
            loss["slice"] < loss["blocks"],
        ),
        (
            "It keeps more than truncated SVDs of all weights do.",
            "a lower held-out loss than with every weight of the blocks at the rank that needs as many FLOPs, "
            "the SVD being that of the weights alone",
            {"loss": loss},
            loss["slice"] < loss["truncated SVD"],
        ),
        (
            "The sliced model runs faster.",
            f"at least {FASTER} times the tokens per second of the whole one, reading a window and writing after it",
            {"milliseconds": times, "times as fast": speeds},
            min(speeds.values()) >= FASTER,
        ),
        (
            "Inference takes about 64% of the compute.",
            f"processor time per token at most {COMPUTE} of the whole model's, reading and writing (the paper "
            "multiplies time by the number of processors, of which fewer are needed)",
            {"share of the whole model's": shares},
            max(shares["prefill"], shares["decode"]) <= COMPUTE,
        ),
        (
            "About a quarter of the parameters goes, the embedding's included.",
            f"at most {STORED} of the whole model's parameters are stored",
            {"parameters": {n: r["parameters"] for n, r in results.items()}, "share": stored},
            stored <= STORED,
        ),
    ]
    return [
        Finding(statement, expected, measured, "reproduced" if holds else "not reproduced")
        for statement, expected, measured, holds in rows
    ]


CLAIM = Claim(
    title="SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
    paper="arXiv:2401.15024",
    claimed="a quarter of the width of a pretrained model, embeddings included, can be cut off after a turn to "
    "principal components, which keeps 90-99% of the quality and 64-66% of the compute of inference",
    where="abstract, sections 3 and 4",
    measure=measure,
    quick={
        "model": "tiny",
        "length": 64,
        "tokens": 512,
        "tokens for blocks": 64,
        "remove": 0.25,
        "rounds": 3,
    },
    full={
        "model": "smollm2-135m",
        "data": "shakespeare",
        "length": 128,
        "windows": 16,
        "tokens": 2048,
        "tokens for blocks": 128,
        "remove": 0.25,
        "rounds": 7,
    },
)
