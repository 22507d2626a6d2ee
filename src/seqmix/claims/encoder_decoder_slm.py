"""Encoder-decoders of small size answer sooner and write faster than decoders of equal size (Elfeki et al. 2025)."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from seqmix.claims._claim import Claim, Finding, Run, Verdict
from seqmix.claims._timing import median_milliseconds
from seqmix.models.backbone import ModelSpec

LATENCY = (
    0.40,
    0.20,
)  # lower by at least the first: reproduced; by less than the second: not (paper: 0.47)
THROUGHPUT = (3.0, 1.5)  # times as high (paper: 4.7)


def models(run: Run) -> dict[str, Any]:
    """Both with random weights: two thirds of the blocks in the encoder, and as many parameters as the decoder."""
    from seqmix.models.hf import create
    from seqmix.models.seq2seq import SeqmixForSeq2SeqLM

    def spec(layout: str, depth: int) -> ModelSpec:
        return ModelSpec(layout=layout, depth=depth, width=run["width"])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        both = SeqmixForSeq2SeqLM.create(
            spec("bidirectional_attention", run["encoder_depth"]),
            spec("attention", run["decoder_depth"]),
        )
        single = create(spec("attention", run["depth"]))
    return {"encoder-decoder": both.eval(), "decoder": single.eval()}


@torch.no_grad()
def times(run: Run, length: int) -> dict[str, float]:
    """Milliseconds to the first token after a source of so many tokens, and for the tokens after it."""
    source = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    pair = models(run)
    both, single = pair["encoder-decoder"], pair["decoder"]
    token = source[:, :1]

    def first(name: str) -> Any:
        if name == "decoder":
            return single(source, use_cache=True, logits_to_keep=1).past_key_values
        return both(source, decoder_input_ids=token, use_cache=True).past_key_values

    caches = {name: first(name) for name in pair}

    def write(name: str) -> None:
        cache = caches[name].copy()
        for _ in range(run["written"]):
            if name == "decoder":
                single(token, past_key_values=cache, use_cache=True)
            else:
                both(decoder_input_ids=token, past_key_values=cache, use_cache=True)

    calls = {f"first token, {name}": lambda n=name: first(n) for name in pair}
    calls |= {f"further tokens, {name}": lambda n=name: write(n) for name in pair}
    sizes = {f"parameters, {name}": model.num_parameters() for name, model in pair.items()}
    return median_milliseconds(calls, run["repeats"]) | sizes


def judge(value: float, bounds: tuple[float, float]) -> Verdict:
    enough, too_little = bounds
    if value >= enough:
        return "reproduced"
    return "not reproduced" if value < too_little else "inconclusive"


def measure(run: Run) -> list[Finding]:
    lower, faster, parameters = {}, {}, {}
    for length in run["lengths"]:
        found = run.remember(f"{length} tokens", lambda n=length: times(run, n))
        ratio = {
            what: found[f"{what}, encoder-decoder"] / found[f"{what}, decoder"]
            for what in ("first token", "further tokens", "parameters")
        }
        lower[length] = 1 - ratio["first token"]
        faster[length] = 1 / ratio["further tokens"]
        parameters = {"parameters, relative to the decoder": round(ratio["parameters"], 3)}
    latency, throughput = statistics.median(lower.values()), statistics.median(faster.values())
    return [
        Finding(
            "The first token of an answer to a long text comes sooner than from a decoder of equal size.",
            f"at least {LATENCY[0]:.0%} sooner in the median over lengths (paper: 47%); not reproduced below "
            f"{LATENCY[1]:.0%}",
            {"sooner by": lower, "median": latency} | parameters,
            judge(latency, LATENCY),
        ),
        Finding(
            "The tokens after it come faster.",
            f"at least {THROUGHPUT[0]:g} times as many per second in the median over lengths (paper: 4.7 times); "
            f"not reproduced below {THROUGHPUT[1]:g}",
            {"times as fast": faster, "median": throughput},
            judge(throughput, THROUGHPUT),
        ),
    ]


CLAIM = Claim(
    title="Return of the Encoder: Maximizing Parameter Efficiency for SLMs",
    paper="arXiv:2501.16273",
    claimed="With two thirds of its blocks in the encoder, a small encoder-decoder has 47% lower first-token latency "
    "and 4.7 times the throughput of a decoder-only model of its size. Here: models of a few million parameters with "
    "random weights, one text at a time; the paper's distillation is in the package but not measured by this claim.",
    where="abstract; the comparison across GPU, CPU and NPU",
    measure=measure,
    quick={
        "width": 32,
        "encoder_depth": 2,
        "decoder_depth": 1,
        "depth": 3,
        "lengths": [64],
        "written": 2,
        "repeats": 2,
    },
    full={
        "width": 192,
        "encoder_depth": 8,
        "decoder_depth": 4,
        "depth": 13,
        "lengths": [512, 1024, 2048],
        "written": 8,
        "repeats": 9,
    },
)
