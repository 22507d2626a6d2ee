"""Lean Attention: decoding attention cut into equal pieces of the context (Sanovar et al. 2024)."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.claims._attention_by import attention_by
from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._finetuning import pretrained, windows
from seqmix.claims._training import QUICK_TEXT
from seqmix.core.numerics import relative_error
from seqmix.core.state import Growing, State
from seqmix.kernels import missing
from seqmix.ops.attention import attention

LARGEST_ERROR = 1e-5  # of the largest output, in float32
LOGITS_ERROR = 1e-4  # of a whole model, relative, in float32
ANGLES_ERROR = (
    1e-3  # from transformers: the angle of a late position, in float32, is known to about as much
)
MEAN_SPEED_UP, LONGEST_SPEED_UP = 2.6, 8.33  # the paper's headline
THREADS_SPEED_UP = 1.5
MODEL_SPEED_UP = 1.05  # of a whole model; what attention's share allows is reported beside it


def measure(run: Run) -> list[Finding]:
    if reason := missing():
        return [
            Finding(
                "Attention in pieces is exact and faster.",
                "compiled kernels, which cut the context",
                {"why not measured": reason},
                "inconclusive",
            )
        ]
    return [equal(run), faster(run), all_threads_help(run), *whole_model(run)]


def operands(heads: dict[str, int], length: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """q [B, 1, H, K], k and v [B, S, G, K], each head's keys together in memory, as caches of models hold them."""
    generator = torch.Generator().manual_seed(length)
    width = heads["width"]
    q = torch.randn(batch, 1, heads["queries"], width, generator=generator)
    k, v = (torch.randn(batch, heads["keys"], length, width, generator=generator) for _ in range(2))
    return [q.to(dtype), *(x.to(dtype).transpose(1, 2) for x in (k, v))]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused attention on the same tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)


def equal(run: Run) -> Finding:
    def error(name: str, length: int, batch: int) -> float:
        q, k, v = operands(run["heads"][name], length, batch, torch.float32)
        exact = plain(q.double(), k.double(), v.double())
        got = attention(q, k, v, form="native")
        return float((got - exact).abs().max() / exact.abs().max())

    errors = {
        f"{name}, {length} keys, batch {batch}": run.remember(
            f"error of {name} at {length} keys, batch {batch}",
            lambda n=name, s=length, b=batch: error(n, s, b),
        )
        for name in run["heads"]
        for length in run["checked lengths"]
        for batch in (1, 3)
    }
    return Finding(
        "Attention in pieces that are merged afterwards is attention.",
        f"outputs in float32 differ from those of torch in float64 by at most {LARGEST_ERROR} of the largest",
        {"largest error": max(errors.values()), "errors": errors},
        "reproduced" if max(errors.values()) <= LARGEST_ERROR else "not reproduced",
    )


def milliseconds(ways: dict[str, Callable[[], Any]], seconds: float, most: int) -> dict[str, float]:
    """The median time of each, in turn, after a call that warms up."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    for repeat in range(most + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:
                samples[name].append((time.perf_counter() - start) * 1e3)
        if repeat > 2 and time.perf_counter() > end:
            break
    return {name: statistics.median(times) for name, times in samples.items()}


def read_speed(megabytes: int) -> float:
    """GB/s at which all threads read memory, by torch's sum of float32 numbers."""
    numbers = torch.ones(megabytes * 2**18)
    taken = milliseconds({"sum": numbers.sum}, 1.0, 20)["sum"]
    return megabytes * 2**20 / taken / 1e6


def faster(run: Run) -> Finding:
    """Median times of both on the same tensors, interleaved."""

    @torch.no_grad()
    def times(name: str, length: int, dtype: torch.dtype) -> dict[str, float]:
        heads = run["heads"][name]
        q, k, v = operands(heads, length, 1, dtype)
        taken = milliseconds(
            {
                "pieces": lambda: attention(q, k, v, form="native"),
                "torch": lambda: plain(q, k, v),
                "torch, one pass over the keys": lambda: attention(q, k, v, form="sdpa"),
            },
            run["seconds"],
            run["repeats"],
        )
        moved = (k.numel() + v.numel()) * k.element_size()
        return {
            **taken,
            "speed-up": taken["torch"] / taken["pieces"],
            "over one pass": taken["torch, one pass over the keys"] / taken["pieces"],
            "GB/s": moved / taken["pieces"] / 1e6,
        }

    lengths, longest = run["lengths"], str(max(run["lengths"]))
    table = {
        name: {
            str(length): run.remember(
                f"times of {name} at {length} keys",
                lambda n=name, s=length: times(n, s, torch.float32),
            )
            for length in lengths
        }
        for name in run["heads"]
    }
    half = {
        name: run.remember(
            f"times of {name} in bfloat16",
            lambda n=name: times(n, run["half length"], torch.bfloat16),
        )
        for name in run["heads"]
    }
    memory = run.remember("memory", lambda: read_speed(run["megabytes"]))
    gains = {name: [row["speed-up"] for row in rows.values()] for name, rows in table.items()}
    mean = statistics.fmean(gain for row in gains.values() for gain in row)
    top = max(rows[longest]["speed-up"] for rows in table.values())
    reached = mean >= MEAN_SPEED_UP and top >= LONGEST_SPEED_UP
    return Finding(
        "Decoding is faster than with the framework's attention, most where the context is long.",
        f"one query, batch 1, float32: at least {MEAN_SPEED_UP} times torch's attention on average over lengths and "
        f"head layouts, and at least {LONGEST_SPEED_UP} times for one layout at the longest, {longest} keys",
        {
            "mean speed-up": mean,
            "largest speed-up at the longest": top,
            "mean speed-up by heads": {n: statistics.fmean(row) for n, row in gains.items()},
            "mean speed-up over torch with the queries of a key head as rows": {
                n: statistics.fmean(row["over one pass"] for row in rows.values())
                for n, rows in table.items()
            },
            "milliseconds, speed-up and GB/s by length": table,
            f"the same in bfloat16 at {run['half length']} keys": half,
            "GB/s of reading memory": memory,
            "threads": torch.get_num_threads(),
        },
        "reproduced" if reached else "not reproduced",
    )


def all_threads_help(run: Run) -> Finding:
    """One text and one key head: nothing to share out but the keys themselves."""

    @torch.no_grad()
    def times() -> dict[str, float]:
        before = torch.get_num_threads()
        q, k, v = operands(
            {"queries": 1, "keys": 1, "width": 64}, run["single length"], 1, torch.float32
        )

        def on(threads: int) -> None:
            torch.set_num_threads(threads)
            attention(q, k, v, form="native")

        try:
            return milliseconds(
                {"1": lambda: on(1), "2": lambda: on(2)}, run["seconds"], run["repeats"]
            )
        finally:
            torch.set_num_threads(before)

    taken = run.remember("one head on one and two threads", times)
    gain = taken["1"] / taken["2"]
    return Finding(
        "Cutting along the context keeps all processors busy where there are fewer heads than processors.",
        f"one text with one key head: two threads at least {THREADS_SPEED_UP} times as fast as one",
        {"speed-up": gain, "milliseconds by threads": taken, "keys": run["single length"]},
        "reproduced" if gain >= THREADS_SPEED_UP else "not reproduced",
    )


# torch's fused attention gets the queries of a key head as rows of one call, so that keys are read once.
WAYS = {"pieces": partial(attention, form="native"), "torch": partial(attention, form="sdpa")}


class Models:
    """One pretrained model in this package's blocks and in transformers, which have both read the same text."""

    @torch.inference_mode()
    def __init__(self, run: Run) -> None:
        from seqmix.convert.hub import to_seqmix
        from seqmix.data.text import read_text

        self.theirs, tokenizer = pretrained(run)
        self.ours = to_seqmix(self.theirs)
        text = "".join(read_text(run["data"]).documents)
        self.ids = windows(tokenizer, text, 1, run["read"] + 1)
        self.state: State = self.ours.model(self.ids[:, :-1])[1]
        self.cache = self.theirs(self.ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def contexts(self, length: int, batch: int) -> tuple[State, Any]:
        """What both keep of the text, repeated until it is `length` tokens, in `batch` rows."""
        times = length // (self.ids.shape[1] - 1)
        state = [
            {
                name: Growing(block[name].tensor.repeat(batch, times, 1, 1))
                for name in ("keys", "values")
            }
            | {"start": block["start"].repeat(batch)}
            for block in self.state
        ]
        cache = (  # layer by layer, for the cache copies what it is given
            tuple(x.repeat(batch, 1, times, 1) for x in (layer.keys, layer.values))
            for layer in self.cache.layers
        )
        return state, type(self.cache)(cache)

    @torch.inference_mode()
    def decode(self, length: int, batch: int, run: Run) -> dict[str, Any]:
        """Logits and median times of one step in every way, and of what in it is attention."""
        state, cache = self.contexts(length, batch)
        token = self.ids[:, -1:].repeat(batch, 1)
        inside: defaultdict[str, list[float]] = defaultdict(list)

        def step(name: str) -> Tensor:
            nonlocal state
            with attention_by(WAYS[name]) as seconds:
                logits, after = self.ours.model(token, state)
            inside[name].append(sum(seconds) * 1e3)
            if len(inside[name]) > 1:  # the first step of every way is after the same context
                state = after
            return logits

        def theirs() -> Tensor:
            return self.theirs(token, past_key_values=cache, use_cache=True).logits

        def grow() -> None:
            """What transformers does to its cache in each step: one longer copy of everything."""
            for layer in cache.layers:
                for x in (layer.keys, layer.values):
                    torch.cat([x, x[:, :, -1:]], dim=2)

        ways: dict[str, Callable[[], Any]] = {name: partial(step, name) for name in WAYS}
        ways["transformers"] = theirs
        logits = {name: way() for name, way in ways.items()}
        ways["transformers, growing its cache"] = grow
        taken = milliseconds(ways, run["seconds of a context"], run["repeats"])
        mine = logits.pop("pieces")
        return {
            "differences": {name: relative_error(mine, other) for name, other in logits.items()},
            "milliseconds": taken,
            "of which attention": {n: statistics.median(times[2:]) for n, times in inside.items()},
        }


def whole_model(run: Run) -> list[Finding]:
    """Decoding with a pretrained model, each way in turn on the same context."""
    models = cache(lambda: Models(run))  # only if something is left to measure
    table = {
        f"{length} tokens, batch {batch}": run.remember(
            f"model with {length} tokens, batch {batch}",
            lambda n=length, b=batch: models().decode(n, b, run),
        )
        for length, batch in run["contexts"]
    }
    return [equal_logits(run, table), faster_model(run, table)]


def equal_logits(run: Run, table: dict[str, Any]) -> Finding:
    differences = {case: row["differences"] for case, row in table.items()}
    allowed = {"torch": LOGITS_ERROR, "transformers": ANGLES_ERROR}
    worst = {name: max(row[name] for row in differences.values()) for name in allowed}
    return Finding(
        "A whole model that decodes with it gives the same logits.",
        f"logits of {run['model']} in float32 after every context, relative: at most {LOGITS_ERROR:g} from those of "
        f"the same blocks with torch's attention, at most {ANGLES_ERROR:g} from those of transformers, which rounds "
        "the angles of rotary positions otherwise",
        {"largest": worst, "differences": differences},
        "reproduced" if all(worst[n] <= allowed[n] for n in allowed) else "not reproduced",
    )


def faster_model(run: Run, table: dict[str, Any]) -> Finding:
    """The gain of a whole step, beside what attention's own gain and its share of the step allow."""
    rows = {}
    for case, found in table.items():
        step, inside = found["milliseconds"], found["of which attention"]
        copying = step["transformers, growing its cache"]
        rows[case] = {
            "times as fast as torch": step["torch"] / step["pieces"],
            "times as fast as transformers": step["transformers"] / step["pieces"],
            "or as transformers without growing its cache": (step["transformers"] - copying)
            / step["pieces"],
            "share of attention": {name: inside[name] / step[name] for name in WAYS},
            "times as fast, attention alone": inside["torch"] / inside["pieces"],
            "at most possible": step["torch"] / (step["torch"] - inside["torch"]),
            "milliseconds": step,
        }
    late = [case for case, (n, _) in zip(rows, run["contexts"], strict=True) if n >= run["long"]]
    others = ("times as fast as torch", "times as fast as transformers")
    least = {other: min(rows[case][other] for case in late) for other in others}
    return Finding(
        "A whole model decodes faster where the context is long.",
        f"{run['model']} in float32, from {run['long']} tokens on, with every batch: at least {MODEL_SPEED_UP:g} times "
        "as fast as the same blocks with torch's fused attention, and as transformers",
        {"least at long contexts": least, "by context": rows, "threads": torch.get_num_threads()},
        "reproduced" if min(least.values()) >= MODEL_SPEED_UP else "not reproduced",
    )


HEADS = {
    "equal heads": {"queries": 4, "keys": 4, "width": 64},
    "grouped heads": {"queries": 9, "keys": 3, "width": 64},
}

CLAIM = Claim(
    title="Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers",
    paper="arXiv:2405.10480",
    claimed="While tokens are generated, attention cut into equal pieces of the context, wherever heads begin, whose "
    "partial softmaxes are merged associatively, is exact and 2.6 times faster than FlashAttention-2 on average, "
    "8.33 times for contexts of 512k tokens.",
    where="abstract of version 1, on GPUs (of later versions: 1.73 times FlashDecoding, 2.18 for 256k tokens)",
    measure=measure,
    quick={
        "heads": HEADS,
        "checked lengths": [5, 1000],
        "lengths": [1024, 4096],
        "half length": 4096,
        "single length": 8192,
        "seconds": 0.05,
        "repeats": 5,
        "megabytes": 16,
        "model": None,
        "data": QUICK_TEXT,
        "read": 32,
        "contexts": [[64, 1], [128, 2]],
        "long": 64,
        "seconds of a context": 0.05,
    },
    full={
        "heads": HEADS,
        "checked lengths": [1, 63, 1000, 32769],
        "lengths": [2**n for n in range(10, 20)],
        "half length": 131072,
        "single length": 524288,
        "seconds": 3.0,
        "repeats": 200,
        "megabytes": 256,
        "model": "smollm2-135m",
        "data": "shakespeare",
        "read": 1024,
        "contexts": [
            [1024, 1],
            [4096, 1],
            [16384, 1],
            [65536, 1],
            [1024, 4],
            [4096, 4],
            [16384, 4],
        ],
        "long": 16384,
        "seconds of a context": 20.0,
    },
)
