"""Which long samples to train on: scores of how much a response depends on what stands far before it.

A sample is a long context and a response. Two measures, of models that have read it
(`seqmix.analyze.long_range`):

    homologous guidance      softmax over samples of norm(P_short) - norm(P_long),   norm to [0, 1]
    contextual awareness     cos(softmax over segments of A, softmax over segments of norm(P_segment))

P are perplexities of the response: to a model with a short and one with a long context, and to the long
one given a single segment of the context; A is the attention that the response pays to each segment. The
second is high where attention rests on segments that do not help. Samples are ranked by
alpha * guidance + (1 - alpha) * softmax over samples of awareness.

Si et al. 2024 (arXiv:2410.15633). The authors' released code has the ranking and the first score; the
alignment inside the second is our reading of its inputs. Axes: N samples, S segments.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from seqmix.core.errors import RangeError, ShapeError


def homologous_guidance(short: Tensor, long: Tensor) -> Tensor:
    """[N] from the perplexities [N] of the responses to both models; sums to 1."""
    if short.shape != long.shape or short.ndim != 1:
        raise ShapeError(
            f"Perplexities of shapes {list(short.shape)} and {list(long.shape)}, wanted [N] both: one for "
            "each sample."
        )
    return (normalised(short) - normalised(long)).softmax(0)


def contextual_awareness(attention: Tensor, segments: Tensor) -> Tensor:
    """[N] from the attention [N, S] to each segment and the perplexity [N, S] with that segment alone."""
    if attention.shape != segments.shape or attention.ndim != 2:
        raise ShapeError(
            f"Attention of shape {list(attention.shape)} and perplexities of {list(segments.shape)}, wanted "
            "[N, S] both: one for each segment of each sample."
        )
    useless = normalised(segments.log()).softmax(-1)
    return cosine_similarity(attention.softmax(-1), useless, dim=-1)


def rank(guidance: Tensor, awareness: Tensor, *, alpha: float = 0.8) -> Tensor:
    """The samples [N], the one to take first at the beginning; alpha 0.8 is the authors' general choice."""
    if not 0 <= alpha <= 1:
        raise RangeError(f"alpha={alpha}, wanted 0 to 1.")
    return (alpha * guidance + (1 - alpha) * awareness.softmax(0)).argsort(descending=True)


def normalised(values: Tensor) -> Tensor:
    """To [0, 1] over the last axis; zeros where all are equal."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low).clamp_min(1e-12)
