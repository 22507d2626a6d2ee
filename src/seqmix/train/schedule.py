"""Learning rates over a run, as a factor of the peak, from the share of the run that is over."""

from __future__ import annotations

import math

from seqmix.core.errors import ConfigError

SCHEDULES = ("cosine", "warmup_stable_decay")
DECAY_SHARE = 0.2  # of a warmup-stable-decay run


def check_schedule(name: str, warmup: float) -> None:
    """Raises `ConfigError` for a schedule that does not exist or a warm-up outside [0, 1)."""
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name!r}, wanted one of {', '.join(SCHEDULES)}.")
    if not 0 <= warmup < 1:
        raise ConfigError(f"warmup={warmup}, wanted a share of the run: at least 0, less than 1.")


def factor(name: str, done: float, *, warmup: float) -> float:
    """The learning rate after the share `done` of the run, relative to its peak.

    Both schedules rise linearly over the share `warmup`. `cosine` then falls as half a cosine to zero;
    `warmup_stable_decay` stays at the peak and falls linearly to zero over the last fifth.
    """
    done = min(max(done, 0.0), 1.0)
    if done < warmup:
        return done / warmup
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
    return min(1.0, (1 - done) / min(DECAY_SHARE, 1 - warmup))
