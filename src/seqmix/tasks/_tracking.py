"""What the state-tracking tasks share: which of the running answers count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.tasks._task import TaskConfig

SCORED = ("every", "last")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(TaskConfig):
    """`scored`: `every` running answer counts, or only the `last` one."""

    scored: str = "every"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scored not in SCORED:
            raise ConfigError(f"scored={self.scored!r}, wanted one of {', '.join(SCORED)}.")


def keep_scored(labels: np.ndarray, scored: str, last: int) -> np.ndarray:
    """All labels, or only the one at position `last`."""
    if scored == "every":
        return labels
    kept = np.full_like(labels, IGNORED)
    kept[:, last] = labels[:, last]
    return kept
