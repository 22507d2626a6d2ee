"""Model fusion: one student learns from several teachers, through the structure of their logits.

The k largest logits of every position are kept, and their outer products, averaged over the positions, are a
graph on the vocabulary whose edges say which tokens are likely together:

    C = 1/T sum_t z_t z_t^T.

Two such graphs, of any two vocabularies, are as far apart as the Gromov-Wasserstein distance says, which for
uniform weights on n nodes each is the smallest, over couplings P, of sum_ijkl P_ik P_jl (C_ij - D_kl)^2.
Wang et al. 2025 (arXiv:2505.13893) replace it by a closed form on sorted node features, in n log n, and
distil with it beside the universal logit loss of Boizard et al. 2024 (arXiv:2402.12030) and cross-entropy.

The closed form here, and why it is near. Let f_i be the mean of row i of C, and R what is left of C when
f_i + f_j - mean(f) is taken from every C_ij, so that the rows of R add up to zero; g and S likewise of D.
For every coupling the cross terms vanish, and the objective is

    2 sum_ik P_ik (f_i - g_k)^2 - (mean f - mean g)^2 + sum_ijkl P_ik P_jl (R_ij - S_kl)^2.

The first sum is smallest where both features are sorted, and the last one is not negative. So the sorted value

    A = 2 mean_i (f_(i) - g_(i))^2 - (mean f - mean g)^2

is at most the distance, and the distance is at most A + |R - S|^2 / n^2 with both in sorted order.
f is a mean over positions of z_t (sum z_t) / n, so no graph has to be built for it.

Axes: T positions, V vocabulary, n nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqmix.core.errors import NumericalError, RangeError, ShapeError
from seqmix.data.packing import IGNORED
from seqmix.train.plan import parameter_groups
from seqmix.train.schedule import factor

# Of the student's logits [B, T, V], those of every teacher, and labels [B, T]: what follows each position.
FusionLoss = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]

LARGEST_EXACT = 8  # nodes: 8! orders are compared


def largest_logits(logits: Tensor, k: int) -> Tensor:
    """[..., V]: the k largest logits of each position, measured from the mean logit, and zeros elsewhere.

    Softmax does not see a constant that is added to all logits of a position, and neither must the graph: hence
    the mean. Raises `RangeError` for a k outside [1, V].
    """
    if not 1 <= k <= logits.shape[-1]:
        raise RangeError(f"k={k}, wanted 1 to {logits.shape[-1]}, the size of the vocabulary.")
    centred = logits - logits.mean(-1, keepdim=True)
    values, places = centred.topk(k, dim=-1)
    return torch.zeros_like(centred).scatter(-1, places, values)


def coactivation_graph(logits: Tensor, k: int) -> Tensor:
    """C [V, V] of logits [..., V]."""
    z = largest_logits(logits, k).flatten(0, -2)
    return z.T @ z / len(z)


def node_features(logits: Tensor, k: int) -> Tensor:
    """f [V], the row means of the graph of logits [..., V], without the graph."""
    z = largest_logits(logits, k).flatten(0, -2)
    return (z * z.mean(-1, keepdim=True)).mean(0)


def sorted_distance(f: Tensor, g: Tensor) -> Tensor:
    """A of two sets of node features [n], in n log n; the shorter one is padded with nodes without edges."""
    nodes = max(len(f), len(g))
    f, g = (F.pad(x, (0, nodes - len(x))).sort().values for x in (f, g))
    return 2 * (f - g).square().mean() - (f.mean() - g.mean()).square()


def distance_bounds(c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """A, which is at most the Gromov-Wasserstein distance of two graphs [n, n], and what is at least it."""
    _check_graphs(c, d)
    c, d = (graph[order][:, order] for graph in (c, d) for order in [graph.mean(-1).argsort()])
    return sorted_distance(c.mean(-1), d.mean(-1)), (c - d).square().mean()


def exact_distance(c: Tensor, d: Tensor) -> Tensor:
    """The Gromov-Wasserstein distance of two positive semi-definite graphs [n, n], n up to 8.

    For such graphs, and a sum of outer products is one, the objective is concave in the coupling, so the smallest
    is at a corner: at one of the n! orders, which are all compared. Raises `RangeError` for more nodes.
    """
    _check_graphs(c, d)
    if len(c) > LARGEST_EXACT:
        raise RangeError(
            f"exact_distance: {len(c)} nodes, wanted at most {LARGEST_EXACT}: the work grows as n! n^2. "
            "Use distance_bounds."
        )
    orders = torch.tensor(list(permutations(range(len(c)))))
    return (c - d[orders.unsqueeze(-1), orders.unsqueeze(-2)]).square().mean((-1, -2)).min()


def _check_graphs(c: Tensor, d: Tensor) -> None:
    if c.shape != d.shape or c.ndim != 2 or c.shape[0] != c.shape[1]:
        raise ShapeError(
            f"Two graphs of shapes {list(c.shape)} and {list(d.shape)}, wanted [n, n] both. Pad the smaller one "
            "with zero rows and columns."
        )


def graph_loss(student_logits: Tensor, teacher_logits: Tensor, *, k: int = 10) -> Tensor:
    """Graph-on-logits distillation: A of the two models' graphs, in units of the teacher's node features.

    Logits [..., V] at the same positions, of vocabularies that may differ; all positions make one graph. Without the
    unit, the mean square of the teacher's features, the loss would shrink with the square of the vocabulary.
    """
    student, teacher = (node_features(x.float(), k) for x in (student_logits, teacher_logits))
    return sorted_distance(student, teacher) / teacher.square().mean()


def universal_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Universal logit distillation: sum_i |p_(i) - q_(i)| of sorted probabilities, the mean over positions.

    Logits [..., V], of vocabularies that may differ: the smaller one is padded with zeros. Boizard et al. 2024.
    """
    p, q = (x.float().softmax(-1) for x in (student_logits, teacher_logits))
    size = max(p.shape[-1], q.shape[-1])
    p, q = (F.pad(x, (0, size - x.shape[-1])).sort(-1, descending=True).values for x in (p, q))
    return (p - q).abs().sum(-1).mean()


def fusion_loss(
    student_logits: Tensor,
    teachers_logits: Sequence[Tensor],
    labels: Tensor,
    *,
    universal: float = 1.0,
    graph: float = 1.0,
    k: int = 10,
) -> Tensor:
    """Cross-entropy + universal * universal loss + graph * graph loss, the latter two the means over the teachers.

    student_logits [..., V], one [..., V_m] for each teacher, labels [...]: what follows each position; -100 is not
    scored, by any part.
    """
    scored = labels != IGNORED
    student = student_logits[scored]
    loss = F.cross_entropy(student.float(), labels[scored])
    for teacher in teachers_logits:
        known = teacher.detach()[scored]
        part = universal * universal_loss(student, known) + graph * graph_loss(student, known, k=k)
        loss = loss + part / len(teachers_logits)
    return loss


def fuse(
    student: PreTrainedModel,
    teachers: Sequence[PreTrainedModel],
    batch: Callable[[int], Mapping[str, Tensor]],
    loss: FusionLoss,
    *,
    steps: int,
    learning_rate: float,
    warmup: float = 0.05,
    weight_decay: float = 0.1,
) -> None:
    """Trains `student` in place: step i minimises `loss` of the logits of all models on the tokens of `batch(i)`.

    The batches are those of `seqmix.train.loop.run`, with labels under their own tokens. The teachers stay as they
    are; AdamW, gradients clipped at norm 1, a cosine schedule. Raises `NumericalError` for a loss that is not finite.
    """
    groups = parameter_groups(student, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    student.train()
    for step in range(steps):
        inputs = dict(batch(step))
        labels = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        with torch.no_grad():
            known = [teacher.eval()(**inputs, use_cache=False).logits for teacher in teachers]
        value = loss(student(**inputs, use_cache=False).logits, known, labels)
        if not value.isfinite():
            raise NumericalError(
                f"The loss at step {step + 1} is {value.item()}. Lower the learning rate ({learning_rate:g})."
            )
        value.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor("cosine", (step + 0.5) / steps, warmup=warmup)
        optimizer.step()
        optimizer.zero_grad()
    student.eval()
