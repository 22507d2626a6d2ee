"""VTrans: masks with an information bottleneck remove more than magnitudes do, fast variants cheaply (Dutta 2024)."""

from __future__ import annotations

import time
from typing import Any

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._classifier import (
    FULL,
    QUICK,
    accuracy,
    calibration,
    mean,
    read_corpora,
    trained,
    tuned,
)

MATCHED = 0.02  # of the accuracy, below the whole model's
FASTER = 5.0  # times; the paper's headline is up to 25
VARIANTS = ("VTrans", "Fast-VTrans", "Faster-VTrans")


def measure(run: Run) -> list[Finding]:
    passages = None

    def one(seed: int) -> dict[str, Any]:
        nonlocal passages
        passages = passages or read_corpora(run.settings)
        return compressed(run, passages, seed)

    seeds = [run.remember(f"seed {seed}", lambda s=seed: one(s)) for seed in range(run["seeds"])]
    return findings(run, seeds)


def compressed(run: Run, passages: Any, seed: int) -> dict[str, Any]:
    """Accuracies by method and share of the weights removed, and the seconds that each method took to choose."""
    from seqmix.compress import TRANSFORMS, Work

    model = trained(run.settings, passages, seed=seed)
    few = max(run["batch"], round(run["few"] * run["windows"]))
    plans = {  # steps, windows, learning rate of the weights
        "VTrans": (run["mask_steps"], run["windows"], run["rate"]),
        "Fast-VTrans": (run["fast_steps"], few, run["rate"]),
        "Faster-VTrans": (run["fast_steps"], few, 0.0),
    }
    found: dict[str, Any] = {"whole": accuracy(model, passages), "seconds": {}}

    def after(pruned: Any, steps: int) -> dict[str, float]:
        pruned = tuned(
            pruned, run.settings, passages, steps=steps, seed=seed + 100, rate=run["tuning_rate"]
        )
        return {"accuracy": accuracy(pruned, passages), "parameters": pruned.num_parameters()}

    for name, (steps, windows, rate) in plans.items():
        transform = TRANSFORMS.get("vtrans")(
            steps=steps, batch=run["batch"], rate=rate, strength=run["strength"], seed=seed
        )
        start = time.process_time()
        masks = transform.learned(model, calibration(passages, windows, seed=seed), Work())
        found["seconds"][name] = time.process_time() - start
        found[name] = {
            str(cut): after(masks.pruned(cut), run["tuning_steps"]) for cut in run["cuts"]
        }
    found["magnitude"] = {}
    for cut in run[
        "cuts"
    ]:  # as many weights in all as VTrans has left, and as many steps of training
        gone = model.num_parameters() - found["VTrans"][str(cut)]["parameters"]
        inside = sum(p.numel() for block in model.model.backbone.blocks for p in block.parameters())
        share = min(0.99, gone / inside)
        pruned = TRANSFORMS.get("magnitude")(remove=share).fit(model, None, Work())
        found["magnitude"][str(cut)] = after(pruned, run["tuning_steps"] + run["mask_steps"])
    return found


def findings(run: Run, seeds: list[dict[str, Any]]) -> list[Finding]:
    whole = mean([found["whole"] for found in seeds])
    table = {
        name: {
            str(cut): {
                value: mean([found[name][str(cut)][value] for found in seeds])
                for value in ("accuracy", "parameters")
            }
            for cut in run["cuts"]
        }
        for name in (*VARIANTS, "magnitude")
    }

    def largest(name: str) -> float:
        """The largest share of the weights that can go at matched quality."""
        good = [c for c in run["cuts"] if table[name][str(c)]["accuracy"] >= whole - MATCHED]
        return max(good, default=0.0)

    reached = {name: largest(name) for name in table}
    seconds = {name: mean([found["seconds"][name] for found in seeds]) for name in VARIANTS}
    saving = seconds["VTrans"] / max(seconds["Faster-VTrans"], 1e-9)
    middle = str(run["cuts"][len(run["cuts"]) // 2])
    lost = table["VTrans"][middle]["accuracy"] - table["Faster-VTrans"][middle]["accuracy"]
    return [
        Finding(
            "At matched quality, bottleneck masks remove more weights than magnitudes do.",
            f"the largest of the shares removed at which the accuracy is at most {MATCHED} below the whole model's is "
            "larger, with as many weights left and as many training steps",
            {"whole": whole, "reached": reached, "results": table},
            "reproduced" if reached["VTrans"] > reached["magnitude"] else "not reproduced",
        ),
        Finding(
            "Training the masks alone on little text saves most of the time, with minimal loss.",
            f"at least {FASTER:.0f} times less processor time than VTrans, and an accuracy at most {MATCHED} lower at "
            f"{middle} of the weights removed",
            {"seconds": seconds, "saving": saving, "accuracy lost": lost},
            "reproduced" if saving >= FASTER and lost <= MATCHED else "not reproduced",
        ),
    ]


CLAIM = Claim(
    title="VTrans: Accelerating Transformer Compression with Variational Information Bottleneck based Pruning",
    paper="arXiv:2406.05276",
    claimed="Masks on channels, heads, neurons and sublayers, trained with an information bottleneck, remove up to 70% "
    "more than earlier methods at equal quality; with 3% of the data, or with the masks alone trained, compression "
    "takes up to 25 times less time. Here: encoders of 0.2 M parameters that tell five corpora apart, against the "
    "magnitude of units.",
    where="abstract; section 4 (BERT, RoBERTa, GPT-2 and LLaMA-2 there)",
    measure=measure,
    quick={
        **QUICK,
        "seeds": 1,
        "cuts": [0.3],
        "mask_steps": 6,
        "fast_steps": 2,
        "windows": 16,
        "few": 0.25,
        "rate": 1e-3,
        "strength": 0.03,
        "tuning_steps": 2,
        "tuning_rate": 1e-3,
    },
    full={
        **FULL,
        "seeds": 2,
        "cuts": [0.3, 0.5, 0.7],
        "mask_steps": 100,
        "fast_steps": 10,
        "windows": 3200,
        "few": 0.03,
        "rate": 1e-3,
        "strength": 0.03,
        "tuning_steps": 30,
        "tuning_rate": 1e-3,
    },
)
