"""Times of calls that are compared: taken in changing order, so that what else the machine does meets all of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping


def median_milliseconds(
    calls: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """The median of `repeats` rounds, each of which calls everything once; a round before them warms up."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    generator = random.Random(0)
    for round_number in range(repeats + 1):
        for name in generator.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name]()
            if round_number:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}
