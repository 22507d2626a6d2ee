"""Prefix attention: a text is read in both directions, and continued in one.

    y_t = W_o sum_{j < max(P, t + 1)} p_tj v_j,   P tokens of prefix, else as in `attention`

The first call reads the prefix, in which every token sees all others; calls that go on from its state are
causal. So `generate` reads the prompt in both directions. This is the prefix language model of Raffel et al. 2020
(arXiv:1910.10683), section 3.2.1, and the non-causal decoder of Wang et al. 2022 (arXiv:2204.05832). Its weights
are those of `attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from seqmix.mixers._attention import WHOLE_TEXT, AttentionConfig, AttentionMixer


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """As of `attention`."""


class PrefixAttention(AttentionMixer):
    """Quadratic time; the state grows by a key and a value per token, unless there is a window."""

    Config = Config
    causal = False
    reads_prefix = True
    exceptions: ClassVar = dict.fromkeys(
        WHOLE_TEXT, "where the first call ends, there the prefix ends"
    )
    examples: ClassVar = {
        "grouped": {"heads": 4, "key_heads": 2, "qk_norm": True},
        "window": {"window": 5, "sinks": 2},
        "long_texts": {"rope_factor": 2.0, "rope_original": 8},
    }

    def _first_visibility(self) -> dict[str, Any]:
        return self._visibility() | {"causal": False}


MIXER = PrefixAttention
