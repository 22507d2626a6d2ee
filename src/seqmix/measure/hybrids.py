"""How much faster `seqmix.accelerate` makes Hugging Face hybrid models: whole models, with and without, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.convert.accelerate import accelerate
from seqmix.core.errors import NumericalError, UnknownName
from seqmix.core.extras import require
from seqmix.core.numerics import relative_error
from seqmix.measure.timing import Timing, summarise

VOCABULARY = 256
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> prefix of its classes, sizes
    "mamba": ("Mamba", {}),
    "qwen3_next": (  # Qwen3-Next-80B's proportions at an eighth of its width, its active experts as one dense layer
        "Qwen3Next",
        {
            "intermediate_size": 704,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 128,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "num_experts": 0,
            "mlp_only_layers": [0, 1, 2, 3],
        },
    ),
}
PROMPT = 16  # tokens before those that are timed when decoding
TOLERANCE = 1e-3  # of logits with and without, relative: far above rounding, far below a mistake


@dataclass(frozen=True)
class HybridRow:
    """One model and what it did: tokens per second of transformers alone and accelerated, and their ratio."""

    model: str
    task: str  # "training" or "decoding"
    length: int
    dtype: str
    threads: int
    plain: Timing
    accelerated: Timing
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_hybrids(
    family: str,
    task: str,
    *,
    length: int = 512,
    repeats: int = 3,
    dtype: torch.dtype = torch.float32,
) -> HybridRow:
    """Tokens per second of one small model with and without acceleration, measured in turns in this process.

    Args:
        family: "mamba" or "qwen3_next", 4 layers of width 256 with random weights.
        task: "training" for a forward and backward pass over one text, "decoding" for single tokens from a cache.
        length: tokens of the text, or tokens that are decoded.
        repeats: turns; a turn is one run without and one with. The ratio is that of the fastest runs.
        dtype: dtype of the weights.

    Raises:
        UnknownName: for another family or task.
        NumericalError: when logits with and without differ by more than rounding; nothing is timed then.
        MissingExtra: when transformers is not installed.
    """
    tasks = {"training": _train, "decoding": _decode}
    if task not in tasks:
        raise UnknownName("task", task, tasks)
    model = build(family).to(dtype)
    tokens = torch.randint(VOCABULARY, (1, max(length, PROMPT)))
    _check(model, tokens[:, : min(length, 128)])
    run = tasks[task](model, tokens)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(repeats + 1):
        for is_accelerated in (False, True):
            with accelerate(model) if is_accelerated else nullcontext():
                taken = run(length)
            if turn:  # the first is for warming up
                seconds[is_accelerated].append(taken)
    return HybridRow(
        model=family,
        task=task,
        length=length,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        plain=summarise(seconds[False]).per(length),
        accelerated=summarise(seconds[True]).per(length),
        ratio=min(seconds[False]) / min(seconds[True]),
    )


def build(family: str) -> nn.Module:
    """The model of a family with random weights, the same ones every time."""
    if family not in FAMILIES:
        raise UnknownName("family of hybrid models", family, FAMILIES)
    transformers = require("transformers", extra="train")
    prefix, sizes = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{prefix}Config")(**SIZES, **sizes)
        model: nn.Module = getattr(transformers, f"{prefix}ForCausalLM")(config)
    return model


def _check(model: nn.Module, tokens: Tensor) -> None:
    """Only what is right is timed."""
    model.eval()
    with torch.no_grad():
        wanted = model(tokens).logits
        with accelerate(model):
            error = relative_error(model(tokens).logits, wanted)
    if not error <= (TOLERANCE if wanted.dtype == torch.float32 else 50 * TOLERANCE):
        raise NumericalError(
            f"measure_hybrids: the logits of {type(model).__name__} with and without acceleration differ by "
            f"{error:.2e} of their size. Please report it; nothing was timed."
        )


def _train(model: nn.Module, tokens: Tensor) -> Callable[[int], float]:
    model.train()

    def run(length: int) -> float:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        model(tokens[:, :length], labels=tokens[:, :length], use_cache=False).loss.backward()
        return time.perf_counter() - start

    return run


def _decode(model: nn.Module, tokens: Tensor) -> Callable[[int], float]:
    model.eval()

    @torch.no_grad()
    def run(length: int) -> float:
        output = model(tokens[:, :PROMPT], use_cache=True)
        cache = "past_key_values" if "past_key_values" in output else "cache_params"
        held, token = output[cache], tokens[:, :1]
        start = time.perf_counter()
        for _ in range(length):
            model(token, use_cache=True, **{cache: held})
        return time.perf_counter() - start

    return run
