"""What a computation costs, as predicted from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes moved to and from memory, and bytes of state kept afterwards."""

    flops: float = 0.0
    bytes: float = 0.0
    state_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.bytes + other.bytes, self.state_bytes + other.state_bytes
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times, self.state_bytes * times)

    __rmul__ = __mul__


def matmul_cost(rows: float, inner: float, columns: float, *, element_bytes: int = 4) -> Cost:
    """A `[rows, inner] x [inner, columns]` product that reads both factors and writes the result once."""
    moved = rows * inner + inner * columns + rows * columns
    return Cost(flops=2.0 * rows * inner * columns, bytes=moved * element_bytes)
