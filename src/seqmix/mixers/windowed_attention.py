"""Windowed attention: every token reads the last `window` tokens, itself included, and the first `sinks`.

    y_t = W_o sum_j p_tj v_j,   p_tj = softmax_j(q_t . k_j / sqrt(K))   over  t - window < j <= t  or  j < sinks

Beltagy et al. 2020 (arXiv:2004.05150), section 3.1; `sinks`: Xiao et al. 2023 (arXiv:2309.17453), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqmix.core.errors import ConfigError
from seqmix.mixers._attention import AttentionConfig, AttentionMixer


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    window: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is None:
            raise ConfigError(
                "windowed_attention: window=none, wanted a number. Use attention to see everything."
            )


class WindowedAttention(AttentionMixer):
    """Linear time; the state holds at most window - 1 + sinks keys and values."""

    Config = Config
    examples: ClassVar = {
        "short": {"window": 6, "rope_factor": 2.0, "rope_original": 8},
        "sinks": {"window": 4, "sinks": 3},
        "one_token": {"window": 1, "sinks": 1},
    }


MIXER = WindowedAttention
