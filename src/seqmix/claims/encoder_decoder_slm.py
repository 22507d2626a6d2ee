"""Small encoder-decoders answer sooner, write faster and learn more than equal decoders (Elfeki et al. 2025)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqmix.claims._answers import Answer, exactly_right
from seqmix.claims._claim import Claim, Finding, Run, Verdict, compare_groups
from seqmix.claims._timing import median_milliseconds
from seqmix.core.errors import ConfigError
from seqmix.models.backbone import ModelSpec

# Lower by at least the first: reproduced; by less than the second: not (paper: 0.47).
LATENCY = (0.40, 0.20)
THROUGHPUT = (3.0, 1.5)  # times as high (paper: 4.7)
UNEQUAL = 0.03  # how far apart sizes may be, as a share
KINDS = ("encoder-decoder", "decoder")
TOPICS, WORDS = 8, 48
VOCABULARY = WORDS + TOPICS + 1  # the last one starts an answer
SHARES = (
    0.5,
    0.3,
)  # of the words of a text: of its first and of its second topic, the others are any words
ANSWER = len(SHARES)


def pair(sizes: Mapping[str, Any], *, vocabulary: int, seed: int) -> dict[str, Any]:
    """Both with random weights: two thirds of the blocks in the encoder, and as many parameters as the decoder.

    Raises `ConfigError` for sizes that make one of them larger.
    """
    from seqmix.models.hf import create
    from seqmix.models.seq2seq import SeqmixForSeq2SeqLM

    def spec(layout: str, depth: int) -> ModelSpec:
        return ModelSpec(layout=layout, depth=depth, width=sizes["width"], vocabulary=vocabulary)

    # The keys and values of cross-attention have to be made up for: by a block, or by wider ones.
    hidden = f"/glu(hidden={sizes['hidden']})" if "hidden" in sizes else ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        both = SeqmixForSeq2SeqLM.create(
            spec("bidirectional_attention", sizes["encoder_depth"]),
            spec("attention", sizes["decoder_depth"]),
            decoder_start_token_id=vocabulary - 1,
        )
        single = create(spec(f"attention{hidden}", sizes["depth"]))
    counts = [model.num_parameters() for model in (both, single)]
    if abs(counts[0] / counts[1] - 1) > UNEQUAL:
        raise ConfigError(
            f"encoder-decoder-slm: {counts[0]} parameters in the encoder-decoder and {counts[1]} in the decoder. "
            "Change depth or hidden until they are the same."
        )
    return dict(zip(KINDS, (both.eval(), single.eval()), strict=True))


@torch.no_grad()
def times(run: Run, length: int) -> dict[str, float]:
    """Milliseconds to the first token after a source of so many tokens, and for the tokens after it."""
    source = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    models = pair(run["timed"], vocabulary=256, seed=0)
    both, single = (models[kind] for kind in KINDS)
    token = source[:, :1]

    def first(name: str) -> Any:
        if name == "decoder":
            return single(source, use_cache=True, logits_to_keep=1).past_key_values
        return both(source, decoder_input_ids=token, use_cache=True).past_key_values

    caches = {name: first(name) for name in models}

    def write(name: str) -> None:
        cache = caches[name].copy()
        for _ in range(run["written"]):
            if name == "decoder":
                single(token, past_key_values=cache, use_cache=True)
            else:
                both(decoder_input_ids=token, past_key_values=cache, use_cache=True)

    calls = {f"first token, {name}": lambda n=name: first(n) for name in models}
    calls |= {f"further tokens, {name}": lambda n=name: write(n) for name in models}
    sizes = {f"parameters, {name}": model.num_parameters() for name, model in models.items()}
    return median_milliseconds(calls, run["repeats"]) | sizes


def texts(count: int, length: int, *, seed: int) -> Tensor:
    """Long inputs with a short output [N, length + 2]: words of two topics and others, then both topics."""
    words = np.random.default_rng(0).dirichlet(np.full(WORDS, 0.15), TOPICS)
    draw = np.random.default_rng([1, seed])
    topics = draw.permuted(np.tile(np.arange(TOPICS), (count, 1)), axis=1)[:, :ANSWER]
    chances = (np.array(SHARES)[:, None] * words[topics]).sum(1) + (1 - sum(SHARES)) / WORDS
    limits = chances.cumsum(1)[:, None, :-1]
    said = (draw.random((count, length, 1)) > limits).sum(2)
    return torch.from_numpy(np.concatenate([said, WORDS + topics], axis=1))


def scores(run: Run, seed: int) -> dict[str, Any]:
    """Accuracy of either kind, trained on the answers alone or taught by a larger decoder as well."""
    from seqmix.models.hf import create
    from seqmix.objectives import Objective
    from seqmix.train.distillation import Distilled
    from seqmix.train.objective import train_objective

    goal = Answer(tokens=ANSWER)
    given = texts(run["texts"], run["source"], seed=2 * seed)
    tests = texts(run["tests"], run["source"], seed=2 * seed + 1)

    def trained(model: Any, windows: Tensor, objective: Objective, steps: int) -> Any:
        train_objective(
            model,
            windows,
            objective,
            steps=steps,
            batch=run["batch"],
            learning_rate=run["learning_rate"],
            seed=seed,
        )
        return model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = create("attention", vocabulary=VOCABULARY, **run["teacher"])
    # The teacher has seen more, as a large pretrained one has.
    more = texts(run["texts of the teacher"], run["source"], seed=1000 + seed)
    trained(teacher, more, goal, run["steps of the teacher"])
    found = {"teacher": exactly_right(teacher, tests, ANSWER)}
    for name, objective in {"alone": goal, "taught": Distilled(goal, teacher)}.items():
        for kind, model in pair(run["taught"], vocabulary=VOCABULARY, seed=seed).items():
            trained(model, given, objective, run["steps"])
            found[f"{kind}, {name}"] = exactly_right(model, tests, ANSWER)
    return found


def judge(value: float, bounds: tuple[float, float]) -> Verdict:
    enough, too_little = bounds
    if value >= enough:
        return "reproduced"
    return "not reproduced" if value < too_little else "inconclusive"


def measure(run: Run) -> list[Finding]:
    return [*speed(run), *quality(run)]


def speed(run: Run) -> list[Finding]:
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


def quality(run: Run) -> list[Finding]:
    found = [
        run.remember(f"scores, seed {s}", lambda s=s: scores(run, s)) for s in range(run["seeds"])
    ]
    accuracy = {name: [one[name] for one in found] for name in found[0]}
    spread = "beyond two standard errors over seeds"
    return [
        Finding(
            "An encoder-decoder learns more if a decoder-only teacher tells what it thinks likely.",
            f"a higher share of answers right in all tokens, {spread}, at equal steps",
            {name: accuracy[name] for name in accuracy if not name.startswith("decoder")},
            compare_groups(accuracy["encoder-decoder, taught"], accuracy["encoder-decoder, alone"]),
        ),
        Finding(
            "On a task with long inputs and short outputs it is then better than a decoder of equal size.",
            f"a higher share of answers right than of the decoder with the same teacher, {spread}",
            {"right": accuracy, "chance": 1 / (TOPICS * (TOPICS - 1))},
            compare_groups(accuracy["encoder-decoder, taught"], accuracy["decoder, taught"]),
        ),
    ]


CLAIM = Claim(
    title="Return of the Encoder: Maximizing Parameter Efficiency for SLMs",
    paper="arXiv:2501.16273",
    claimed="With two thirds of its blocks in the encoder, a small encoder-decoder has 47% lower first-token latency "
    "and 4.7 times the throughput of a decoder-only model of its size; taught by a large decoder, it is up to 6 points "
    "better, above all where inputs are long and outputs short. Here: speed of models of a few million parameters with "
    "random weights, one text at a time; and quality of models of 40,000 parameters on made-up texts, whose two topics "
    "are to be named.",
    where="abstract; the comparison across GPU, CPU and NPU; section 3 (distillation)",
    measure=measure,
    quick={
        "timed": {"width": 32, "encoder_depth": 6, "decoder_depth": 3, "depth": 10},
        "lengths": [64],
        "written": 2,
        "repeats": 2,
        "taught": {
            "width": 16,
            "encoder_depth": 2,
            "decoder_depth": 1,
            "depth": 3,
            "hidden": 50,
        },
        "teacher": {"width": 16, "depth": 1},
        "source": 8,
        "texts": 32,
        "texts of the teacher": 32,
        "tests": 16,
        "batch": 4,
        "learning_rate": 6e-3,
        "steps": 2,
        "steps of the teacher": 2,
        "seeds": 1,
    },
    full={
        "timed": {"width": 192, "encoder_depth": 6, "decoder_depth": 3, "depth": 10},
        "lengths": [512, 1024, 2048],
        "written": 8,
        "repeats": 9,
        "taught": {
            "width": 32,
            "encoder_depth": 2,
            "decoder_depth": 1,
            "depth": 3,
            "hidden": 99,
        },
        "teacher": {"width": 64, "depth": 3},
        "source": 64,
        "texts": 1000,
        "texts of the teacher": 20000,
        "tests": 1000,
        "batch": 32,
        "learning_rate": 6e-3,
        "steps": 150,
        "steps of the teacher": 200,
        "seeds": 2,
    },
)
