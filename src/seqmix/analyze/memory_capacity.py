"""How many associations a memory holds: store random key-value pairs, ask for each, measure the error.

A learning rule is any function (q, k, v) -> o over [B, T, H, K], [B, T, H, K], [B, T, H, V], such as an
operator of seqmix with its other arguments filled in. Keys are random unit vectors, as in the capacity
arguments of associative-memory theory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor

from seqmix.core.errors import RangeError
from seqmix.ops.attention import attention
from seqmix.ops.delta_rule import delta_rule
from seqmix.ops.linear_attention import linear_attention

LearningRule = Callable[[Tensor, Tensor, Tensor], Tensor]


def hebbian(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """S += k v^T: linear attention."""
    return linear_attention(q, k, v, scale=1.0)[0]


def fading(q: Tensor, k: Tensor, v: Tensor, *, decay: float = 0.98) -> Tensor:
    """S <- decay S + k v^T: extinction of what is not rehearsed, as in retention."""
    g = q.new_full(q.shape[:3], decay).log()
    return linear_attention(q, k, v, g, scale=1.0)[0]


def error_correcting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """S += k (v - S^T k)^T: the delta rule (Rescorla-Wagner), strength 1."""
    return delta_rule(q, k, v, torch.ones_like(q[..., 0]), scale=1.0)[0]


def softmax(q: Tensor, k: Tensor, v: Tensor, *, sharpness: float = 16.0) -> Tensor:
    """Softmax attention over all pairs: a memory that grows with them, for comparison."""
    return attention(q, k, v, scale=sharpness)


LEARNING_RULES: Mapping[str, LearningRule] = {
    "hebbian": hebbian,
    "fading": fading,
    "error_correcting": error_correcting,
    "softmax": softmax,
}


def retrieval_error(
    rule: LearningRule,
    *,
    pairs: int,
    key_width: int,
    value_width: int = 64,
    trials: int = 8,
    seed: int = 0,
) -> float:
    """Mean of |read - v|^2 / |v|^2 over all stored pairs, each asked for after the last was stored.

    For the Hebbian rule and random unit keys the expectation is (pairs - 1) / key_width: every other pair
    adds its overlap with the key asked for, and the mean square of an overlap is 1 / key_width.
    Raises `RangeError` for a count below 1.
    """
    if min(pairs, key_width, value_width, trials) < 1:
        raise RangeError(
            f"retrieval_error: pairs={pairs}, key_width={key_width}, value_width={value_width}, "
            f"trials={trials}, wanted all at least 1."
        )
    generator = Generator().manual_seed(seed)
    keys = torch.randn(trials, pairs, 1, key_width, generator=generator)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    values = torch.randn(trials, pairs, 1, value_width, generator=generator)
    # Only the last token's query meets the finished memory, so each key is asked for in a head of its own,
    # and all heads store the same pairs.
    queries = keys.transpose(1, 2).expand(-1, pairs, -1, -1)  # [trials, T, H = pairs, K]
    read = rule(queries, keys.expand(-1, -1, pairs, -1), values.expand(-1, -1, pairs, -1))[:, -1]
    wanted = values.squeeze(2)
    return float(((read - wanted) ** 2).sum(-1).div((wanted**2).sum(-1)).mean())


def capacity(
    rule: LearningRule, *, key_width: int, error: float = 0.5, most: int = 4096, **options: int
) -> int:
    """The largest number of pairs whose `retrieval_error` stays below `error`, found by bisection."""
    low, high = 0, 1
    while (
        high <= most and retrieval_error(rule, pairs=high, key_width=key_width, **options) < error
    ):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if retrieval_error(rule, pairs=middle, key_width=key_width, **options) < error:
            low = middle
        else:
            high = middle
    return low
