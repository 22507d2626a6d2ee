"""LAWCAT: linear attention with convolutions across tokens, distilled from a Transformer (Liu et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch

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
from seqmix.claims._timing import median_milliseconds

FOUND = 0.9  # passkeys beyond the distillation length: abstract of the paper
FASTER = 1.05


def measure(run: Run) -> list[Finding]:
    given = source(run)
    original = run.remember("original", lambda: described(run, given, given.model))
    found = run.remember("converted", lambda: converted(run, given))
    times = {
        str(length): run.remember(
            f"milliseconds at {length} tokens", lambda n=length: prefill(run, given, n)
        )
        for length in run["prefill_lengths"]
    }
    return [retrieval(run, original, found), speed(times)]


def described(run: Run, given: Source, model: Any) -> dict[str, Any]:
    lengths = [run["length"], *run["longer"]]
    return {
        **quality(model, given.held_out),
        "passkey": passkeys(run, given, model, lengths),
    }


def converted(run: Run, given: Source) -> dict[str, Any]:
    """Three of four layers LAWCAT, after the transfer and after recovery, all on short windows."""
    student, steps = taught(run, given, "lawcat")
    hybrid, kept = hybrid_of(run, given, student)
    del student
    return {
        "transfer": steps,
        "kept": kept,
        "recovered": described(run, given, recovered(run, given, hybrid)),
    }


def prefill(run: Run, given: Source, length: int) -> dict[str, float]:
    """Median milliseconds of one layer of the model's sizes on a text of so many tokens, in turn."""
    from seqmix.convert.linearize import linearized

    with torch.no_grad():
        x = torch.randn(1, length, given.model.config.hidden_size)
        mixers = {
            "attention": given.model.model.backbone.blocks[0].mixer,
            "lawcat": linearized(given.model, "lawcat", [0]).model.backbone.blocks[0].mixer,
        }
        calls = {name: lambda m=mixer: m(x) for name, mixer in mixers.items()}
        return median_milliseconds(calls, run["repeats"])


def retrieval(run: Run, original: dict[str, Any], found: dict[str, Any]) -> Finding:
    after = found["recovered"]
    beyond = {str(length): after["passkey"][str(length)] for length in run["longer"]}
    return Finding(
        f"Distilled on windows of {run['length']} tokens, the model finds passkeys in longer texts (the paper: "
        "Mistral-7B, from 1,000 to 22,000 tokens; here: three of four layers converted, on thousands of tokens, "
        "a quarter of them passkeys of other numbers).",
        f"at least {FOUND:.0%} of the passkeys at every longer length, or as many as the original finds there",
        {
            "beyond the distillation length": beyond,
            "all lengths": after["passkey"],
            "original": original["passkey"],
            "tokens": run["transfer_tokens"] + run["recover_tokens"],
            "nats per token": {
                "original": original["loss"],
                "carried over": found["transfer"]["carried over"]["loss"],
                "transferred, all layers": found["transfer"]["transferred"]["loss"],
                "recovered": after["loss"],
            },
            "blocks that stay attention": found["kept"],
        },
        "reproduced"
        if all(
            accuracy >= min(FOUND, original["passkey"][length]) and accuracy > 0
            for length, accuracy in beyond.items()
        )
        else "not reproduced",
    )


def speed(times: dict[str, dict[str, float]]) -> Finding:
    ratios = {n: row["attention"] / row["lawcat"] for n, row in times.items()}
    lengths = [int(n) for n in times]
    past = [n for n in lengths if all(ratios[str(m)] >= FASTER for m in lengths if m >= n)]
    return Finding(
        "Past some length a layer reads a prompt faster than attention does (the paper: FlashAttention-2 on a GPU, "
        "8,000).",
        f"at least {FASTER} times as fast from some measured length on",
        {"from": past[0] if past else None, "times as fast": ratios, "milliseconds": times},
        "reproduced" if past else "not reproduced",
    )


CLAIM = Claim(
    title="LAWCAT: Efficient Distillation from Quadratic to Linear Attention with Convolution across Tokens for Long "
    "Context Modeling",
    paper="arXiv:2509.18467",
    claimed="a Transformer distilled on texts of 1,000 tokens into gated linear attention with convolutions finds over "
    "90% of the passkeys in 22,000, and reads long prompts faster than attention",
    where="abstract; section 4",
    measure=measure,
    quick={
        "model": "tiny",
        "layout": "4x[attention]",
        "data": OWN_SOURCE,
        "length": 192,
        "longer": [224],
        "windows": 4,
        "held_out": 2,
        "passkeys": 2,
        "damage_windows": 1,
        "transfer_tokens": 384,
        "transfer_rate": 3e-3,
        "recover_tokens": 384,
        "recover_rate": 1e-3,
        "prefill_lengths": [64, 128],
        "repeats": 1,
    },
    full={
        "model": "smollm2-135m",
        "data": "shakespeare",
        "length": 256,
        "longer": [512],
        "windows": 32,
        "held_out": 4,
        "passkeys": 10,
        "damage_windows": 1,
        "transfer_tokens": 6144,
        "transfer_rate": 3e-3,
        "recover_tokens": 4096,
        "recover_rate": 1e-3,
        "prefill_lengths": [512, 1024, 2048, 4096, 8192],
        "repeats": 3,
    },
)
