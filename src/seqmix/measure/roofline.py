"""The speed limits of this machine, and the time that a predicted cost takes at them.

    seconds = max(flops / flops_per_second, bytes / bytes_per_second)

The limits are measured once by a matrix product and by a copy that exceeds the caches (Williams et al.
2009, "Roofline", section 2). Nothing stands for the overhead of calling operators, so small work on a short
context takes longer than predicted; long contexts come close.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from seqmix.core.cost import Cost
from seqmix.measure.timing import time_calls


@dataclass(frozen=True)
class Roofline:
    """What this machine reached when it was calibrated."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, cost: Cost) -> float:
        """Predicted seconds for `cost`: the slower of computing and moving."""
        return max(cost.flops / self.flops_per_second, cost.bytes / self.bytes_per_second)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(*, size: int = 768, megabytes: int = 64, seconds: float = 0.4) -> Roofline:
    """Measures a float32 product of `[size, size]` matrices and a copy of `megabytes`."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    out = torch.empty(size, size)
    product = time_calls(lambda: torch.mm(a, b, out=out), seconds=seconds, warmup=2)
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    copy = time_calls(lambda: target.copy_(source), seconds=seconds, warmup=2)
    return Roofline(
        flops_per_second=2 * size**3 / product.median,
        bytes_per_second=2 * source.numel() * source.element_size() / copy.median,
    )
