"""Errors that a user can act on.

Every message names the argument, what came, what was wanted and what to do. The command line prints
them without a traceback; anything that is not a `SeqmixError` is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SeqmixError(Exception):
    """Base of every error that seqmix raises for a user's input or machine."""


class ShapeError(SeqmixError, ValueError):
    """A tensor has the wrong number of axes or sizes."""


class DtypeError(SeqmixError, TypeError):
    """A tensor has a dtype that the operator does not take."""


class RangeError(SeqmixError, ValueError):
    """A value lies outside its legal range."""


class ConfigError(SeqmixError, ValueError):
    """A configuration field is unknown, or its value is impossible."""


class LayoutError(ConfigError):
    """A layout such as `3x[mamba2], attention` does not parse."""


class DataError(SeqmixError, ValueError):
    """Data is missing, empty, unreadable or too short."""


class BudgetError(SeqmixError, ValueError):
    """A budget such as `decode_ms<2@8192` does not parse."""


class StudyError(SeqmixError, RuntimeError):
    """A study on disk cannot be continued by this command."""


class CheckpointError(SeqmixError, RuntimeError):
    """A checkpoint is missing, damaged or of another kind of model."""


class NumericalError(SeqmixError, ArithmeticError):
    """A loss or a result is not finite."""


class MissingExtra(SeqmixError, ImportError):
    """An optional package is needed here and absent."""


class NoUsableForm(SeqmixError, RuntimeError):
    """The form that was asked for cannot compute these inputs."""

    def __init__(self, operator: str, rejected: dict[str, str]) -> None:
        self.rejected = rejected
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        super().__init__(
            f"{operator}: no usable form ({reasons}). Leave out `form` to let seqmix choose one."
        )


class UnknownName(SeqmixError, LookupError):
    """A name that no file of a registry folder has."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        super().__init__(f"There is no {kind} called {name!r}.{hint} Known: {', '.join(known)}.")
