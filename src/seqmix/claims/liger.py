"""Liger: a pretrained Transformer as a gated recurrence without new parameters (Lan et al. 2025).

Beyond the paper, the window of attention keeps the first token of a text: the model puts the weights there that it has
no use for, and a window without it changes many times as much.
"""

from __future__ import annotations

from typing import Any

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._conversion import (
    OWN_SOURCE,
    Source,
    hybrid_of,
    passkeys,
    quality,
    recovered,
    source,
    taught,
)

SHARE = 0.93  # of the original's quality: abstract of the paper
KEPT = 0.9  # of the original's passkey accuracy
LENGTHS = (1_000, 32_000)  # at which states are compared


def measure(run: Run) -> list[Finding]:
    given = source(run)
    original = run.remember("original", lambda: described(run, given, given.model))
    found = run.remember("converted", lambda: converted(run, given))
    return findings(run, original, found)


def described(run: Run, given: Source, model: Any) -> dict[str, Any]:
    backbone = model.model.backbone
    return {
        **quality(model, given.held_out),
        "parameters": model.num_parameters(),
        "passkey": passkeys(run, given, model, [run["length"]]),
        "state bytes": {str(n): backbone.state_bytes(n) for n in LENGTHS},
    }


def converted(run: Run, given: Source) -> dict[str, Any]:
    """Every layer Liger, and three of four, from one transfer; each then recovers for the same tokens."""
    student, steps = taught(run, given, run["to"])
    hybrid, kept = hybrid_of(run, given, student)
    return {
        "transfer": steps,
        "kept": kept,
        "hybrid, transferred": described(run, given, hybrid),
        "hybrid, recovered": described(run, given, recovered(run, given, hybrid)),
        "all, recovered": described(run, given, recovered(run, given, student)),
    }


def findings(run: Run, original: dict[str, Any], found: dict[str, Any]) -> list[Finding]:
    whole, hybrid = found["all, recovered"], found["hybrid, recovered"]
    added = whole["parameters"] - original["parameters"]
    share = whole["accuracy"] / max(original["accuracy"], 1e-9)
    tokens = run["transfer_tokens"] + run["recover_tokens"]
    short, long = (str(n) for n in LENGTHS)
    growth = {
        name: row["state bytes"][long] - row["state bytes"][short]
        for name, row in (("original", original), ("all", whole), ("hybrid", hybrid))
    }
    length = str(run["length"])
    before, after = (row["passkey"][length] for row in (original, hybrid))
    losses = {
        "original": original["loss"],
        "carried over": found["transfer"]["carried over"]["loss"],
        "transferred": found["transfer"]["transferred"]["loss"],
        "recovered": whole["loss"],
        "hybrid, transferred": found["hybrid, transferred"]["loss"],
        "hybrid, recovered": hybrid["loss"],
    }
    return [
        Finding(
            "The conversion adds no parameters.",
            "as many as before, in every layer converted",
            {"added": added, "parameters": whole["parameters"], "mixer": run["to"]},
            "reproduced" if added == 0 else "not reproduced",
        ),
        Finding(
            "With all layers converted, a small number of tokens brings back 93% of the quality (the paper: 20 million "
            "tokens, benchmark scores, models of 1B to 8B; here: thousands, next-token accuracy on held-out text).",
            f"at least {SHARE:.0%} of the original's next-token accuracy",
            {
                "share": share,
                "tokens": tokens,
                "accuracy": whole["accuracy"],
                "original": original["accuracy"],
                "hybrid's share": hybrid["accuracy"] / max(original["accuracy"], 1e-9),
                "nats per token": losses,
            },
            "reproduced" if share >= SHARE else "not reproduced",
        ),
        Finding(
            "The state does not grow with the text.",
            f"as many bytes at {long} tokens as at {short} with all layers converted; "
            "at most a third of the original's growth with three of four",
            {"growth in bytes": growth, "all": whole["state bytes"]},
            "reproduced"
            if growth["all"] == 0 and growth["hybrid"] <= growth["original"] / 3
            else "not reproduced",
        ),
        Finding(
            "With three of four layers converted, passkeys are found at the length of the conversion (a quarter of the "
            "texts that it learns from are passkeys of other numbers).",
            f"at least {KEPT:.0%} of the original's accuracy at {length} tokens",
            {
                "original": before,
                "hybrid, transferred": found["hybrid, transferred"]["passkey"][length],
                "hybrid, recovered": after,
                "all, recovered": whole["passkey"][length],
                "blocks that stay attention": found["kept"],
                "relative error of a layer, mean": {
                    name: sum(found["transfer"][f"errors {name}"].values())
                    / len(found["transfer"][f"errors {name}"])
                    for name in ("before", "after")
                },
            },
            "reproduced" if before > 0 and after >= KEPT * before else "not reproduced",
        ),
    ]


CLAIM = Claim(
    title="Liger: Linearizing Large Language Models to Gated Recurrent Structures",
    paper="arXiv:2503.01496",
    claimed="gates made from the pretrained keys turn a Transformer into a gated recurrence without new parameters, "
    "and low-rank training for 0.02% of the pretraining tokens brings back 93% of its quality",
    where="abstract; sections 3 and 4",
    measure=measure,
    quick={
        "model": "tiny",
        "to": "liger(window=32, sinks=1)",
        "layout": "4x[attention]",
        "data": OWN_SOURCE,
        "length": 192,
        "windows": 8,
        "held_out": 2,
        "passkeys": 2,
        "damage_windows": 1,
        "transfer_tokens": 384,
        "transfer_rate": 3e-3,
        "recover_tokens": 384,
        "recover_rate": 1e-3,
    },
    full={
        "model": "smollm2-135m",
        "to": "liger(window=64, sinks=1)",
        "data": "shakespeare",
        "length": 256,
        "windows": 32,
        "held_out": 6,
        "passkeys": 10,
        "damage_windows": 1,
        "transfer_tokens": 6144,
        "transfer_rate": 3e-3,
        "recover_tokens": 4096,
        "recover_rate": 1e-3,
    },
)
