"""The speed limits of this machine that a kernel can meet, and how much of a time each of them explains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from seqmix.measure.bench import MATMUL_SIZE, matmul
from seqmix.measure.timing import time_calls, time_in_turn


@dataclass(frozen=True)
class Settings:
    """How floors are measured; `shrink` divides the lengths, for a quick look that means little."""

    seconds: float = 1.0
    shrink: int = 1
    matmul_size: int = MATMUL_SIZE


@dataclass(frozen=True)
class Roofs:
    """What this machine reaches, from one run.

    A 2048-cube torch matmul in float32; the faster of copying and of adding up 256 MiB; torch.exp of 16384
    numbers by one thread, times the threads.
    """

    flops_per_second: float
    bytes_per_second: float
    exponentials_per_second: float


def measure_roofs(settings: Settings) -> Roofs:
    """The three speed limits."""
    numbers = torch.rand(2**26 // settings.shrink)
    target = torch.empty_like(numbers)
    few, out = torch.rand(2**14), torch.empty(2**14)
    calls: dict[str, Callable[[], object]] = {
        "product": matmul(size=settings.matmul_size),
        "copy": lambda: target.copy_(numbers),
        "read": numbers.sum,
    }
    timings = time_in_turn(calls, seconds=settings.seconds, warmup=2)
    exponentials = time_calls(lambda: torch.exp(few, out=out), seconds=settings.seconds, warmup=9)
    size = float(numbers.numel() * numbers.element_size())
    return Roofs(
        flops_per_second=2 * settings.matmul_size**3 / timings["product"].median,
        bytes_per_second=max(2 * size / timings["copy"].median, size / timings["read"].median),
        exponentials_per_second=few.numel() / exponentials.median * torch.get_num_threads(),
    )


def limits(row: Mapping[str, Any], roofs: Mapping[str, Any]) -> dict[str, float]:
    """Which share of our time each roof explains; together they can exceed 1 where they overlap."""
    if "work" not in row:
        return {}
    work, seconds = row["work"], row["times"]["ours"]["median_ms"] / 1e3
    arithmetic = "arithmetic at a matrix product's speed"
    found = {arithmetic: work["flops"] / roofs["flops_per_second"]}
    found["memory"] = work["bytes"] / roofs["bytes_per_second"]
    found["exponentials"] = work["exponentials"] / roofs["exponentials_per_second"]
    return {name: taken / seconds for name, taken in found.items() if taken}
