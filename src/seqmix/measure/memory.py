"""How much memory a process takes at its peak, and how much of it a state is."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

STATUS = Path("/proc/self/status")
MEGABYTE = 2**20


class PeakMemory:
    """Resident memory inside a `with` block: `baseline` at its start, `peak` until its end, in bytes.

    Use it in a process of its own, right after the imports: memory that a process has freed is often
    kept by the allocator, so a second measurement in one process starts from too high a baseline.
    """

    baseline: int
    peak: int

    def __enter__(self) -> Self:
        _reset_peak()
        self.baseline = resident_bytes()
        self.peak = self.baseline
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.peak = max(self.baseline, peak_bytes())

    def to_dict(self) -> dict[str, Any]:
        """In megabytes of 2**20 bytes: baseline, peak, and the difference, which is the work's own."""
        return {
            "baseline_mb": self.baseline / MEGABYTE,
            "peak_mb": self.peak / MEGABYTE,
            "memory_mb": (self.peak - self.baseline) / MEGABYTE,
        }


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not tell, its peak."""
    return _status("VmRSS") or peak_bytes()


def allocated_bytes() -> int:
    """Memory that this process has allocated and written to; where the system does not tell, its resident memory.

    Unlike resident memory it counts no pages of files, such as libraries, which the system takes away and brings back
    as it likes, and it counts what has been swapped out.
    """
    return _status("RssAnon") + _status("VmSwap") or resident_bytes()


def peak_bytes() -> int:
    """The largest resident memory of this process since it started (or since a `PeakMemory` began).

    Linux: VmHWM. There `ru_maxrss` of a fresh process starts at the size of the process that started it,
    because the kernel keeps the larger of the two across `exec`, so it cannot serve as a measure.
    """
    if peak := _status("VmHWM"):
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_freed() -> None:
    """Gives memory that was freed back to the system, where the C library can (glibc).

    Without it, what is allocated next may take none from the system, and `allocated_bytes` does not grow.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _reset_peak() -> None:
    """Makes VmHWM start again from now; where that is not allowed, the peak of the imports stays in it."""
    path = Path("/proc/self/clear_refs")
    if path.exists() and os.access(path, os.W_OK):
        path.write_text("5")


def _status(field: str) -> int:
    if not STATUS.exists():
        return 0
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
