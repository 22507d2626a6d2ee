"""Hedgehog: linear attention whose feature map is trained to give the weights of softmax attention.

    y_t = W_o sum_{j <= t} w_tj v_j / sum_{j <= t} w_tj,   w_tj = f(q_t) . f'(k_j)
    f(x) = [softmax(W x), softmax(-W x)]   per head, over its channels; f' is another of this form

Zhang et al. 2024 (arXiv:2402.04347), section 4; queries and keys turn before the feature map, as in the authors'
conversion of Llama.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from seqmix.core.state import State
from seqmix.mixers._mimicry import MimicMixer
from seqmix.mixers._projection import ProjectionConfig


@dataclass(frozen=True, kw_only=True)
class Config(ProjectionConfig):
    pass


class Hedgehog(MimicMixer):
    """Linear time; state [B, H, 2 K, K + 1] and the number of tokens seen."""

    Config = Config
    examples: ClassVar = {
        "grouped": {"heads": 4, "key_heads": 2, "qk_norm": True, "rope_base": None},
        "own_heads": {"head_width": 6, "bias": True, "output_bias": True},
        "long_texts": {"rope_factor": 2.0, "rope_original": 8, "rotary": 0.5},
    }

    def prepare(
        self, x: Tensor, q: Tensor, k: Tensor, state: State, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
        return q, k, None, {}


MIXER = Hedgehog
