"""Attention: every token reads an average of all earlier values, weighted by how well their keys match.

    y_t = W_o sum_{j <= t} p_tj v_j,   p_tj = softmax_j(q_t . k_j / sqrt(K)),   q and k rotated by their positions

Vaswani et al. 2017 (arXiv:1706.03762), section 3.2; rotary positions: Su et al. 2021 (arXiv:2104.09864);
`key_heads`: Ainslie et al. 2023 (arXiv:2305.13245); `window`: Beltagy et al. 2020 (arXiv:2004.05150);
`sinks`: Xiao et al. 2023 (arXiv:2309.17453); `best`: Gupta et al. 2021 (arXiv:2106.06899);
`qk_norm`: Henry et al. 2020 (arXiv:2010.04245).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqmix.mixers._attention import AttentionConfig, AttentionMixer


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    pass


class Attention(AttentionMixer):
    """Quadratic time; the state grows by a key and a value per token, unless there is a window."""

    Config = Config
    examples: ClassVar = {
        "grouped": {"heads": 4, "key_heads": 2, "qk_norm": True},
        "window": {"window": 5, "sinks": 2},
        "hard": {"best": 12},  # with few, rounding to bfloat16 changes which they are
        "no_positions": {"rope_base": None},
        "long_texts": {"rope_factor": 2.0, "rope_original": 8, "rotary": 0.5},
        "own_heads": {"head_width": 6, "scale": 0.5, "bias": True, "output_bias": True},
    }


MIXER = Attention
