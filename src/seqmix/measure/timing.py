"""How long a call takes: median and quartiles of repeated calls after warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from seqmix.core.errors import RangeError


@dataclass(frozen=True)
class Timing:
    """Median, lower and upper quartile of `repeats` samples, in whatever unit the samples have."""

    median: float
    low: float
    high: float
    repeats: int

    def scaled(self, factor: float) -> Timing:
        """The same samples in another unit."""
        return Timing(self.median * factor, self.low * factor, self.high * factor, self.repeats)

    def per(self, amount: float) -> Timing:
        """Seconds for `amount` things, as things per second: the slow quartile becomes the low one."""
        return Timing(amount / self.median, amount / self.high, amount / self.low, self.repeats)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(samples: Sequence[float]) -> Timing:
    """Median and quartiles of at least one sample."""
    if not samples:
        raise RangeError("summarise: no samples, wanted at least one.")
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


def time_calls(
    function: Callable[[], object],
    *,
    seconds: float = 1.0,
    warmup: int = 1,
    minimum: int = 3,
    maximum: int = 1000,
) -> Timing:
    """Seconds per call of `function`, called until `seconds` are over.

    `warmup` calls come first and are not counted; then at least `minimum` and at most `maximum` calls are.
    """
    if minimum < 1 or maximum < minimum:
        raise RangeError(
            f"time_calls: minimum={minimum}, maximum={maximum}, wanted 1 <= minimum <= maximum."
        )
    for _ in range(warmup):
        function()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < minimum or (len(samples) < maximum and time.perf_counter() < end):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return summarise(samples)


def time_in_turn(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    warmup: int = 1,
    rounds: int = 5,
    minimum: int = 3,
) -> dict[str, Timing]:
    """Seconds per call of each function, in turn, so that a slower moment of the machine meets all of them.

    Every round gives each function `seconds / rounds`, one call at least. After `minimum` rounds it stops
    when the time for all is over. `warmup` calls of each come first and are not counted.
    """
    if not 1 <= minimum <= rounds:
        raise RangeError(
            f"time_in_turn: minimum={minimum}, rounds={rounds}, wanted 1 <= minimum <= rounds."
        )
    for function in functions.values():
        for _ in range(warmup):
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    for turn in range(rounds):
        if turn >= minimum and time.perf_counter() > end:
            break
        for name, function in functions.items():
            spent = 0.0
            while spent == 0.0 or spent < seconds / rounds:
                start = time.perf_counter()
                function()
                took = time.perf_counter() - start
                samples[name].append(took)
                spent += max(took, 1e-9)
    return {name: summarise(taken) for name, taken in samples.items()}
