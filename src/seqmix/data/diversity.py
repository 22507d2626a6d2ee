"""How varied a text is: the share of distinct tokens, and the share of n-grams that it has said before."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from seqmix.core.errors import RangeError


def type_token_ratio(tokens: Sequence[Hashable], *, window: int | None = None) -> float:
    """Distinct tokens divided by all tokens, of the last `window` of them (None: of all).

    The ratio falls with the length of any text, so compare texts over the same window. It is 0 for no tokens.
    Raises `RangeError` for a window below 1.
    """
    if window is not None and window < 1:
        raise RangeError(f"type_token_ratio: window={window}, wanted at least 1, or None for all.")
    seen = list(tokens)[-window:] if window is not None else list(tokens)
    return len(set(seen)) / len(seen) if seen else 0.0


def repeated_ngrams(tokens: Sequence[Hashable], n: int = 4) -> float:
    """The share of the n-grams that have come before in the same text: 1 - distinct / all.

    It is 0 for a text shorter than n tokens. Raises `RangeError` for n below 1.
    """
    if n < 1:
        raise RangeError(f"repeated_ngrams: n={n}, wanted at least 1.")
    ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
