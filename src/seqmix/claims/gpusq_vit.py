"""GPUSQ-ViT: two of four weights in few bits, with distillation, on a language model (Yu et al. 2023)."""

from __future__ import annotations

from typing import Any

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._rounding import loss, num_bytes
from seqmix.claims._training import QUICK_TEXT, specify

SMALLER = 6.4  # times: 32 bits over 8 / 2 for values and 2 / 2 for places
LOST = 0.01  # of the loss, "negligible"


def measure(run: Run) -> list[Finding]:
    found = run.remember("model", lambda: compared(run))
    return [pattern(found), size(found), quality(found)]


def compared(run: Run) -> dict[str, Any]:
    """A model trained on a text, then two of four on the same text, and losses on text that neither saw."""
    from seqmix.compress import TRANSFORMS, Calibration, Work
    from seqmix.compress.two_four import ToTwoFour
    from seqmix.data.text import Corpus, read_text
    from seqmix.linears.two_four import TwoFour
    from seqmix.train import train

    source = QUICK_TEXT if run["data"] == "own source" else run["data"]
    text = "\n".join(read_text(source).documents)[: run["characters"]]
    cut = int(0.9 * len(text))
    seen, unseen = (Corpus("part", (part,)) for part in (text[:cut], text[cut:]))
    spec, training = specify("attention", run["training"])
    trained = train(spec, seen, seed=0, progress=False, length=run["length"], **training)
    model, tokenizer = trained.model.eval(), trained.tokenizer
    options = {"length": run["length"], "windows": run["windows"]}
    held_out = Calibration.of(unseen, tokenizer, **options).windows
    data = Calibration.of(seen, tokenizer, length=run["length"], windows=100_000)
    work = Work()
    options = {"steps": run["steps"], "learning_rate": run["rate"], "batch": run["batch"]}
    sparse = ToTwoFour(**options).fit(model, data, work).eval()
    untrained = ToTwoFour(steps=0).fit(model, data, Work()).eval()
    eight = TRANSFORMS.get("int8")(layers="backbone").fit(model, data, Work()).eval()
    places = [p for p, m in sparse.model.named_modules() if isinstance(m, TwoFour)]
    dense = sum(model.model.get_submodule(p).weight.numel() for p in places) * 4
    kept = [sparse.model.get_submodule(p).whole() for p in places]
    return {
        "zeros in a group of four, at least": min(
            int((w.unflatten(1, (-1, 4)) == 0).sum(2).min()) for w in kept
        ),
        "bytes of the layers": {
            "dense": dense,
            "two of four": sum(num_bytes(sparse.model.get_submodule(p)) for p in places),
        },
        "bytes of the model": {"dense": num_bytes(model), "two of four": num_bytes(sparse)},
        "loss": {
            "dense": loss(model, held_out),
            "int8": loss(eight, held_out),
            "two of four": loss(sparse, held_out),
            "without training": loss(untrained, held_out),
        },
    }


def pattern(found: dict[str, Any]) -> Finding:
    zeros = found["zeros in a group of four, at least"]
    return Finding(
        "Every group of four weights has two zeros.",
        "at least two zeros in every group of every linear layer of the blocks, in what is stored",
        {"zeros in a group of four, at least": zeros},
        "reproduced" if zeros >= 2 else "not reproduced",
    )


def size(found: dict[str, Any]) -> Finding:
    sizes = found["bytes of the layers"]
    ratio = sizes["dense"] / sizes["two of four"]
    return Finding(
        "The model becomes 6.4 times smaller with 8 bits, and 12.7 times with 4.",
        f"the linear layers take at least {SMALLER * 0.95:.3g} times fewer bytes, within 5% of the figure for 8 bits; "
        "4 bits are not built",
        {"times smaller": ratio, "layers": sizes, "model": found["bytes of the model"]},
        "reproduced" if ratio >= 0.95 * SMALLER else "not reproduced",
    )


def quality(found: dict[str, Any]) -> Finding:
    losses = found["loss"]
    change = losses["two of four"] / losses["dense"] - 1
    return Finding(
        "Training with distillation keeps the quality.",
        f"a held-out loss at most {LOST:.0%} above the dense model's",
        {"relative change of the loss": change, "losses": losses},
        "reproduced" if change <= LOST else "not reproduced",
    )


CLAIM = Claim(
    title="Boost Vision Transformer with GPU-Friendly Sparsity and Quantization",
    paper="arXiv:2305.10727",
    claimed="Two of every four weights, in 8 or 4 bits, with distillation while pruning and while quantising: 6.4 to "
    "12.7 times smaller with negligible loss of accuracy.",
    where="abstract. A language model trained here, not a vision Transformer; no speed, for CPUs have no such kernel",
    measure=measure,
    quick={
        "data": "own source",
        "characters": 40_000,
        "length": 64,
        "windows": 4,
        "training": {"width": 32, "depth": 1, "heads": 2, "steps": 4, "batch": 4},
        "steps": 2,
        "rate": 3e-4,
        "batch": 4,
    },
    full={
        "data": "shakespeare",
        "characters": 2_000_000,
        "length": 128,
        "windows": 100,
        "training": {
            "width": 128,
            "depth": 4,
            "heads": 4,
            "steps": 500,
            "batch": 8,
            "learning_rate": 3e-3,
        },
        "steps": 150,
        "rate": 1e-3,
        "batch": 8,
    },
)
