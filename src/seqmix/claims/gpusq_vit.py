"""GPUSQ-ViT: two of four weights in few bits, with distillation, on a language model (Yu et al. 2023)."""

from __future__ import annotations

from typing import Any

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._rounding import loss, num_bytes, prepared
from seqmix.claims._training import QUICK_TEXT, specify

PAIRS = "4 bits, two of four pairs"  # the pattern that GPUs have instructions of 4 bits for
KINDS = {
    "8 bits": {"bits": 8, "unit": 1},
    "4 bits": {"bits": 4, "unit": 1},
    PAIRS: {"bits": 4, "unit": 2},
}
SMALLER = {"8 bits": 6.4, PAIRS: 12.7}  # times, as the paper counts
NEAR = 0.95  # of these, for the factor of every output
LOST = 0.01  # of the loss, "negligible"


def measure(run: Run) -> list[Finding]:
    found = run.remember("model", lambda: compared(run))
    sizes = run.remember("sizes", lambda: sizes_of(run))
    return [pattern(found), size(sizes), *(quality(found, kind) for kind in SMALLER)]


def compared(run: Run) -> dict[str, Any]:
    """A model trained on a text, then two of four on the same text, and losses on text that neither saw."""
    from seqmix.compress import TRANSFORMS, Calibration, Work
    from seqmix.compress.two_four import ToTwoFour
    from seqmix.data.text import Corpus, read_text
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
    how = {"learning_rate": run["rate"], "batch": run["batch"]}

    def made(steps: int, kind: str) -> Any:
        step = ToTwoFour(steps=steps, **how, **KINDS[kind])
        return step.fit(model, data, Work()).eval()

    trained_kinds = {kind: made(run["steps"], kind) for kind in KINDS}
    eight = TRANSFORMS.get("int8")(layers="backbone").fit(model, data, Work()).eval()
    return {
        "zeros, at least": {
            kind: fewest_zeros(sparse, KINDS[kind]["unit"])
            for kind, sparse in trained_kinds.items()
        },
        "loss": {
            "dense": loss(model, held_out),
            "int8, dense": loss(eight, held_out),
            **{kind: loss(sparse, held_out) for kind, sparse in trained_kinds.items()},
        },
        "loss without training": {kind: loss(made(0, kind), held_out) for kind in KINDS},
    }


def sparse_layers(model: Any) -> dict[str, Any]:
    from seqmix.linears.two_four import TwoFour

    return {place: m for place, m in model.model.named_modules() if isinstance(m, TwoFour)}


def fewest_zeros(model: Any, unit: int) -> int:
    """In a group of four units of the stored weights, over all layers; a unit is zero if all its weights are."""
    groups = [layer.whole().unflatten(1, (-1, 4, unit)) for layer in sparse_layers(model).values()]
    return min(int((weights == 0).all(3).sum(2).min()) for weights in groups)


def sizes_of(run: Run) -> dict[str, Any]:
    """Bytes of the linear layers of a pretrained model's blocks, places and factors included."""
    from seqmix.compress import Work
    from seqmix.compress.two_four import ToTwoFour

    model, data, _ = prepared(run)
    found: dict[str, Any] = {}
    for kind, options in KINDS.items():
        layers = sparse_layers(ToTwoFour(steps=0, **options).fit(model, data, Work()))
        dense = sum(4 * layer.in_features * layer.out_features for layer in layers.values())
        found[kind] = {"dense": dense, "stored": sum(map(num_bytes, layers.values()))}
    return found


def pattern(found: dict[str, Any]) -> Finding:
    zeros = found["zeros, at least"]
    return Finding(
        "Every group of four weights has two zeros.",
        "at least two zeros in every group of every linear layer of the blocks, in what is stored; with the pattern of "
        "pairs, two zero pairs in every group of four pairs",
        {"zeros in a group of four, at least": zeros},
        "reproduced" if min(zeros.values()) >= 2 else "not reproduced",
    )


def size(sizes: dict[str, dict[str, int]]) -> Finding:
    ratios = {kind: row["dense"] / row["stored"] for kind, row in sizes.items()}
    holds = all(ratios[kind] >= NEAR * wanted for kind, wanted in SMALLER.items())
    return Finding(
        "The model becomes 6.4 times smaller with 8 bits, and 12.7 times with 4. (A place for every weight takes 2 "
        "bits: two of four in 4 bits are 10.7 times smaller at most, and 12.7 needs pairs that share a place.)",
        f"the linear layers of a pretrained model's blocks take at least {NEAR:.0%} of 6.4 times fewer bytes with 8 "
        "bits, and of 12.7 times with 4 bits in pairs",
        {"times smaller": ratios, "bytes": sizes},
        "reproduced" if holds else "not reproduced",
    )


def quality(found: dict[str, Any], kind: str) -> Finding:
    losses = found["loss"]
    change = {kind: losses[kind] / losses["dense"] - 1 for kind in KINDS}
    return Finding(
        f"Training with distillation keeps the quality: {kind}.",
        f"a held-out loss at most {LOST:.0%} above the dense model's",
        {
            "relative change of the loss": change,
            "losses": losses,
            "without training": found["loss without training"],
        },
        "reproduced" if change[kind] <= LOST else "not reproduced",
    )


CLAIM = Claim(
    title="Boost Vision Transformer with GPU-Friendly Sparsity and Quantization",
    paper="arXiv:2305.10727",
    claimed="Two of every four weights, in 8 or 4 bits, with distillation while pruning and while quantising: 6.4 to "
    "12.7 times smaller with negligible loss of accuracy.",
    where="abstract. A language model trained here, not a vision Transformer; weights alone are rounded; no speed, for "
    "CPUs have no such kernel",
    measure=measure,
    quick={
        "model": "tiny",
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
        "model": "smollm2-135m",
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
