"""SLAB: batch norms that take over from layer norms, and simplified linear attention (Guo et al. 2024)."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from seqmix.claims._bytes import VOCABULARY, byte_windows, loss_on, spread
from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._timing import median_milliseconds
from seqmix.claims._training import QUICK_TEXT

NEAR = 0.01  # share by which a loss may be higher
EXACT = 1e-4  # largest difference of folded and unfolded logits, as a share of the largest logit
SOFTMAX, LINEAR = "attention(heads=4)", "linear_attention(heads=4, feature_map=relu)"
SIMPLIFIED = "linear_attention(heads=4, feature_map=relu, convolution_size=5)"
MODELS = {  # mixer, norm, share of the training over which the norm changes
    "softmax, layer norm": (SOFTMAX, "layer", 0.0),
    "softmax, progressive": (SOFTMAX, "progressive_batch", 0.8),
    "softmax, at once": (SOFTMAX, "progressive_batch", 0.0),
    "linear, layer norm": (LINEAR, "layer", 0.0),
    "simplified, layer norm": (SIMPLIFIED, "layer", 0.0),
    "simplified, progressive": (SIMPLIFIED, "progressive_batch", 0.8),
}


def measure(run: Run) -> list[Finding]:
    found = {
        name: [
            run.remember(f"{name}, seed {seed}", lambda n=name, s=seed: after_training(run, n, s))
            for seed in range(run["seeds"])
        ]
        for name in MODELS
    }
    losses = {name: [seed["loss"] for seed in seeds] for name, seeds in found.items()}
    times = run.remember("times", lambda: latencies(run))
    return [
        folding_is_exact(found),
        faster_without_norms(times),
        accuracy_kept(losses),
        progress_helps(losses),
        convolution_helps(losses),
        faster_than_softmax(times),
        whole_recipe(losses),
    ]


def new_model(mixer: str, norm: str, sizes: dict[str, int], seed: int = 0) -> Any:
    from seqmix.models.hf import create

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layout = f"{sizes['depth']}x[{mixer}/glu]"
        return create(layout, width=sizes["width"], vocabulary=VOCABULARY, norm=norm, norm_eps=1e-5)


def after_training(run: Run, name: str, seed: int) -> dict[str, float]:
    """The held-out loss in nats per byte, and how far the folded model is from it."""
    from seqmix.layers.progressive_norm import switch_over
    from seqmix.objectives import OBJECTIVES
    from seqmix.train.objective import train_objective

    mixer, norm, share = MODELS[name]
    train, held_out = byte_windows(run["data"], run["length"])
    model = new_model(mixer, norm, run["sizes"], seed)
    switch_over(model, round(share * run["steps"]))
    train_objective(
        model,
        train,
        OBJECTIVES.get("causal")(),
        steps=run["steps"],
        batch=run["batch"],
        learning_rate=run["learning_rate"],
        seed=seed,
    )
    model.eval()
    rows = spread(held_out, run["rows"])
    result = {"loss": loss_on(model, rows)}
    if norm != "layer":
        folded = fold(model)
        with torch.no_grad():
            wanted, got = (m(input_ids=rows[:8]).logits for m in (model, folded))
        result["difference"] = float((got - wanted).abs().max() / wanted.abs().max())
        result["folded loss"] = loss_on(folded, rows)
    return result


def fold(model: Any) -> Any:
    from seqmix.compress import Calibration, Work
    from seqmix.compress.fold_norms import FoldNorms

    nothing = Calibration(windows=torch.zeros(1, 2, dtype=torch.long))
    return FoldNorms().fit(model, nothing, Work()).eval()


def latencies(run: Run) -> dict[str, dict[str, float]]:
    """Milliseconds to read a text, and per token to write one, of models with random weights."""
    from seqmix.layers.progressive_norm import switch_over

    models = {}
    for name, mixer in (("softmax", SOFTMAX), ("simplified", SIMPLIFIED)):
        models[f"{name}, layer norm"] = new_model(mixer, "layer", run["timed"]).eval()
        batch = new_model(mixer, "progressive_batch", run["timed"]).eval()
        switch_over(batch, 0)
        models[f"{name}, batch norm"], models[f"{name}, folded"] = batch, fold(batch)
    ids = torch.arange(run["tokens"])[None] % 256

    @torch.inference_mode()
    def read(model: Any) -> None:
        model.model(ids)

    @torch.inference_mode()
    def write(model: Any) -> None:
        state = None
        for token in ids[0, : run["written"]]:
            _, state = model.model(token.view(1, 1), state)

    reading = median_milliseconds(
        {name: lambda m=model: read(m) for name, model in models.items()}, run["repeats"]
    )
    writing = median_milliseconds(
        {name: lambda m=model: write(m) for name, model in models.items()}, run["repeats"]
    )
    return {
        "reading": reading,
        "writing": {name: time / run["written"] for name, time in writing.items()},
    }


def folding_is_exact(found: dict[str, list[dict[str, float]]]) -> Finding:
    differences = {
        name: [seed["difference"] for seed in seeds]
        for name, seeds in found.items()
        if "difference" in seeds[0]
    }
    return Finding(
        "The model with its norms folded into linear layers computes what it did before.",
        f"logits of every trained model with batch norms differ by at most {EXACT:g} of the largest",
        {
            "difference": differences,
            "loss before and after": {
                name: [[seed["loss"], seed["folded loss"]] for seed in found[name]]
                for name in differences
            },
        },
        "reproduced" if max(map(max, differences.values())) <= EXACT else "not reproduced",
    )


def faster_without_norms(times: dict[str, dict[str, float]]) -> Finding:
    ratios = {
        f"{way}, {name}": time[f"{name}, folded"] / time[f"{name}, layer norm"]
        for way, time in times.items()
        for name in ("softmax", "simplified")
    }
    return Finding(
        "The folded model is faster than the same model with layer norms.",
        "medians of interleaved runs: less time to read a text and to write one, for both kinds of attention",
        {"ratio": ratios, "milliseconds": times},
        "reproduced" if max(ratios.values()) < 1 else "not reproduced",
    )


def faster_than_softmax(times: dict[str, dict[str, float]]) -> Finding:
    ratios = {
        norm: times["reading"][f"simplified, {norm}"] / times["reading"][f"softmax, {norm}"]
        for norm in ("layer norm", "folded")
    }
    return Finding(
        "Simplified linear attention reads a text faster than softmax attention.",
        "medians of interleaved runs: less time, with layer norms and folded",
        {"ratio": ratios},
        "reproduced" if max(ratios.values()) < 1 else "not reproduced",
    )


def near(losses: dict[str, list[float]], ours: str, theirs: str) -> dict[str, Any]:
    ratio = statistics.fmean(losses[ours]) / statistics.fmean(losses[theirs])
    return {ours: losses[ours], theirs: losses[theirs], "ratio": ratio}


def accuracy_kept(losses: dict[str, list[float]]) -> Finding:
    found = near(losses, "softmax, progressive", "softmax, layer norm")
    return Finding(
        "A model whose layer norms became batch norms in training predicts as well as one with layer norms.",
        f"a held-out loss at most {NEAR:.0%} higher, mean over seeds",
        found,
        "reproduced" if found["ratio"] <= 1 + NEAR else "not reproduced",
    )


def progress_helps(losses: dict[str, list[float]]) -> Finding:
    late, at_once = losses["softmax, progressive"], losses["softmax, at once"]
    return Finding(
        "Batch norms from the first step on do worse than those that take over step by step.",
        "a higher held-out loss, beyond two standard errors over seeds",
        {"progressive": late, "at once": at_once},
        compare_groups(at_once, late),
    )


def convolution_helps(losses: dict[str, list[float]]) -> Finding:
    plain, ours = losses["linear, layer norm"], losses["simplified, layer norm"]
    found = near(losses, "simplified, layer norm", "softmax, layer norm")
    close = found["ratio"] <= 1 + NEAR
    verdict = compare_groups(plain, ours)
    return Finding(
        "The convolution of the values makes ReLU linear attention better, and as good as softmax attention.",
        "a lower held-out loss than without it, beyond two standard errors over seeds, and at most "
        f"{NEAR:.0%} above that of softmax attention",
        {"linear, layer norm": plain, **found},
        verdict if close else "not reproduced",
    )


def whole_recipe(losses: dict[str, list[float]]) -> Finding:
    found = near(losses, "simplified, progressive", "softmax, layer norm")
    return Finding(
        "Both together keep the accuracy of a softmax model with layer norms.",
        f"a held-out loss at most {NEAR:.0%} higher, mean over seeds",
        found,
        "reproduced" if found["ratio"] <= 1 + NEAR else "not reproduced",
    )


CLAIM = Claim(
    title="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch "
    "Normalization",
    paper="arXiv:2405.11582",
    claimed="Layer norms that give way to batch norms during training keep the accuracy and vanish at inference, and "
    "linear attention with ReLU features and a depthwise convolution is as good as softmax attention and faster. Here: "
    "causal models of 0.6 M parameters on bytes of plays, times of 5 M parameters; the paper's are image models, and "
    "LLaMA of 350 M for the norms.",
    where="sections 3.2, 3.3, 4.1 and 4.3, tables 1, 5 and 6",
    measure=measure,
    quick={
        "data": QUICK_TEXT,
        "length": 32,
        "sizes": {"width": 16, "depth": 1},
        "batch": 4,
        "steps": 4,
        "learning_rate": 2e-3,
        "rows": 8,
        "timed": {"width": 16, "depth": 1},
        "tokens": 16,
        "written": 4,
        "repeats": 1,
        "seeds": 1,
    },
    full={
        "data": "shakespeare",
        "length": 64,
        "sizes": {"width": 128, "depth": 3},
        "batch": 8,
        "steps": 150,
        "learning_rate": 2e-3,
        "rows": 256,
        "timed": {"width": 256, "depth": 6},
        "tokens": 1024,
        "written": 32,
        "repeats": 9,
        "seeds": 2,
    },
)
