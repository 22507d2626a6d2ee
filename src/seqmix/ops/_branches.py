"""Linear recurrences along the branches of a tree, in one pass.

    S_t = d_t S_p(t) + k_t v_t^T,   o_t = S_t^T q_t,   p(t) the node before t
    o_t = (q_t D_t0)^T S + sum_s (q_t . D_ts k_s) v_s   over the nodes s on the path to t

D_ts is the product of the transitions d after s on the path to t, and D_t0 of all of them: the accumulated transitions
of Wu et al. 2025 (STree, arXiv:2505.14969). No state is made but the one that was there, S.
Axes: B batch, T nodes, H heads, K key width, V value width.
"""

from __future__ import annotations

from torch import Tensor

from seqmix.core.tree import Tree


def read_branches(
    tree: Tree, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor
) -> Tensor:
    """o [B, T, H, V] for q, k [B, T, H, K], v [B, T, H, V], log decays g [B, T, H] or [B, T, H, K], S [B, H, K, V].

    Logarithms are added up between two nodes, since differences of their sums from the beginning would cancel.
    """
    ancestors = tree.ancestors.to(q.device)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, T, ...]
    if g is None:
        scores = (q @ k.transpose(-1, -2)).masked_fill(~ancestors, 0)
        return (scores @ v + q @ state).transpose(1, 2)
    after = (ancestors.unsqueeze(1) & ~ancestors).to(
        g.dtype
    )  # [T, T, T]: node on the path from s to t
    whole = ancestors.to(g.dtype) @ g.flatten(2)  # [B, T, H * K]
    whole = whole.unflatten(-1, g.shape[2:]).transpose(1, 2).exp()
    between = (
        (after @ g.flatten(2).unsqueeze(1)).exp().unflatten(-1, g.shape[2:])
    )  # [B, T, T, H, ...]
    if g.ndim == 3:
        scores = (q @ k.transpose(-1, -2)) * between.movedim(-1, 1)
        whole = whole.unsqueeze(-1)
    else:
        scores = ((q.unsqueeze(3) * k.unsqueeze(2)) * between.movedim(3, 1)).sum(-1)
    scores = scores.masked_fill(~ancestors, 0)
    o: Tensor = scores @ v + (q * whole) @ state
    return o.transpose(1, 2)


def signs(tree: Tree, transition: Tensor) -> Tensor:
    """Of the products of transitions [B, T, H] along the path to every node: 1 or -1."""
    negative = (transition < 0).to(transition.dtype)
    flips = tree.ancestors.to(transition) @ negative
    return 1 - 2 * (flips % 2)
