"""Model fusion: graphs of logits, the sorted distance and its bounds, the losses, and that students learn."""

from functools import partial
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from seqmix.core.errors import NumericalError, RangeError, ShapeError
from seqmix.models.hf import create
from seqmix.train.fusion import (
    coactivation_graph,
    distance_bounds,
    exact_distance,
    fuse,
    fusion_loss,
    graph_loss,
    largest_logits,
    node_features,
    sorted_distance,
    universal_loss,
)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def graphs(nodes, seed):
    return coactivation_graph(draw(30, nodes, seed=seed), 3), coactivation_graph(
        draw(30, nodes, seed=seed + 50, scale=1.5), 3
    )


def objective(c, d, coupling):
    """sum_ijkl P_ik P_jl (C_ij - D_kl)^2, written out."""
    difference = c[:, :, None, None] - d[None, None]
    return torch.einsum("ik,jl,ijkl->", coupling, coupling, difference.square())


def test_only_the_largest_logits_stay_whatever_is_added_to_all():
    logits = draw(4, 9)
    kept = largest_logits(logits, 3)
    assert ((kept != 0).sum(-1) == 3).all()
    torch.testing.assert_close(largest_logits(logits + 7.0, 3), kept)


def test_features_are_the_row_means_of_the_graph():
    logits = draw(2, 10, 12)
    torch.testing.assert_close(node_features(logits, 4), coactivation_graph(logits, 4).mean(-1))


@pytest.mark.parametrize("seed", range(4))
def test_exact_distance_is_the_best_order_and_no_coupling_is_better(seed):
    c, d = graphs(5, seed)
    exact = exact_distance(c, d)
    orders = [torch.eye(5).double()[list(order)] / 5 for order in permutations(range(5))]
    torch.testing.assert_close(exact, torch.stack([objective(c, d, p) for p in orders]).min())
    for other in range(20):  # mixtures of orders are couplings too
        weights = draw(len(orders), seed=100 + other).mul(3).softmax(0)
        mixed = sum(w * p for w, p in zip(weights, orders, strict=True))
        assert objective(c, d, mixed) >= exact - 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_the_exact_distance_lies_within_the_bounds(seed):
    c, d = graphs(6, seed)
    lower, upper = distance_bounds(c, d)
    assert lower <= exact_distance(c, d) <= upper
    assert lower > 0


def test_bounds_meet_where_nothing_but_features_differs():
    """C_ij = f_i + f_j has no residual."""
    f, g = draw(6), draw(6, seed=1)
    c, d = f[:, None] + f[None], g[:, None] + g[None]
    lower, upper = distance_bounds(c, d)
    torch.testing.assert_close(lower, upper)


def test_the_distance_does_not_see_the_order_of_nodes():
    c, d = graphs(6, 0)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    moved = c[order][:, order]
    torch.testing.assert_close(exact_distance(moved, d), exact_distance(c, d))
    torch.testing.assert_close(
        sorted_distance(moved.mean(-1), d.mean(-1)), distance_bounds(c, d)[0]
    )
    assert exact_distance(moved, c) == pytest.approx(0, abs=1e-12)


def test_universal_loss_sorts_and_pads():
    p, q = torch.tensor([[0.5, 0.2, 0.3]]), torch.tensor([[0.1, 0.9]])
    expected = abs(0.5 - 0.9) + abs(0.3 - 0.1) + 0.2
    assert universal_loss(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-5)


def test_losses_vanish_between_equals_and_reach_the_student():
    student, teacher = draw(2, 6, 12).float().requires_grad_(), draw(2, 6, 14, seed=1).float()
    for loss in (universal_loss, graph_loss):
        assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
        (gradient,) = torch.autograd.grad(loss(student, teacher), student)
        assert gradient.abs().sum() > 0


def test_positions_that_are_not_scored_do_not_count():
    student, teacher = draw(1, 6, 9).float(), draw(1, 6, 9, seed=1).float()
    labels = torch.tensor([[1, 2, -100, 3, -100, 4]])
    loss = fusion_loss(student, [teacher], labels, k=3)
    student[0, [2, 4]], teacher[0, [2, 4]] = 5.0, -5.0
    torch.testing.assert_close(fusion_loss(student, [teacher], labels, k=3), loss)


def test_without_its_parts_the_fusion_loss_is_cross_entropy():
    student, labels = draw(1, 4, 9).float(), torch.tensor([[1, 2, 3, 4]])
    plain = fusion_loss(student, [student], labels, universal=0.0, graph=0.0, k=3)
    torch.testing.assert_close(plain, F.cross_entropy(student[0], labels[0]))


def small(seed, vocabulary=16):
    torch.manual_seed(seed)
    return create("attention", width=16, depth=1, heads=2, vocabulary=vocabulary)


def batch(index):
    ids = (torch.arange(12) * (1 + index % 3) + index).remainder(16).unsqueeze(0)
    return {"input_ids": ids, "labels": ids}


def test_a_student_learns_from_text_and_teachers_and_the_teachers_stay():
    student, teachers = small(0), [small(1), small(2, vocabulary=20)]
    for teacher in teachers:
        fuse(teacher, [], batch, partial(fusion_loss, k=4), steps=60, learning_rate=1e-2)
    before = [weight.clone() for teacher in teachers for weight in teacher.parameters()]
    losses = []

    def loss(*arguments):
        value = fusion_loss(*arguments, graph=0.1, k=4)
        losses.append(value.item())
        return value

    fuse(student, teachers, batch, loss, steps=60, learning_rate=1e-2)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    after = [weight for teacher in teachers for weight in teacher.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not student.training


def test_labels_are_those_that_follow():
    """The labels of the batches stand under their own tokens; the loss sees what comes next."""
    seen = []

    def loss(student, teachers, labels):
        seen.append(labels)
        return student.sum() * 0.0

    fuse(small(0), [], batch, loss, steps=1, learning_rate=1e-3)
    assert seen[0][0, :-1].tolist() == batch(0)["labels"][0, 1:].tolist()
    assert seen[0][0, -1] == -100


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(NumericalError, match="step 1"):
        fuse(small(0), [], batch, lambda s, t, y: s.sum() * torch.nan, steps=2, learning_rate=1e-3)


def test_impossible_arguments_are_refused():
    with pytest.raises(RangeError, match="1 to 9"):
        largest_logits(draw(2, 9), 10)
    with pytest.raises(RangeError, match="at most 8"):
        exact_distance(torch.eye(9), torch.eye(9))
    with pytest.raises(ShapeError, match="Pad"):
        exact_distance(torch.eye(3), torch.eye(4))
