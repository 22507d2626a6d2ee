"""What the delta rule is for, and the ends of its range."""

import pytest
import torch
import torch.nn.functional as F

from seqmix.core.errors import RangeError, ShapeError
from seqmix.kernels import missing
from seqmix.ops import delta_rule

FORMS = ["chunked", "definition", *([] if missing() else ["native"])]


def unit_keys(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize("form", FORMS)
def test_writing_again_replaces_what_a_key_held(form):
    key = unit_keys(1, 1, 1, 8).expand(1, 80, 1, 8)
    v = torch.randn(1, 80, 1, 5)
    o, state = delta_rule(
        key, key, v, torch.ones(1, 80, 1), scale=1.0, output_final_state=True, form=form
    )
    torch.testing.assert_close(o, v)
    torch.testing.assert_close((key[:, -1, :, None] @ state)[:, :, 0], v[:, -1])


@pytest.mark.parametrize("form", FORMS)
def test_beta_of_two_reflects_and_so_counts_parity(form):
    bits = torch.randint(2, (1, 200, 1))
    key = unit_keys(1, 1, 1, 4)
    keys = key.expand(1, 200, 1, 4)
    start = key[0, 0, 0, :, None].expand(1, 1, 4, 1)  # holds 1 under the key
    o, _ = delta_rule(
        keys, keys, torch.zeros(1, 200, 1, 1), 2.0 * bits, scale=1.0, initial_state=start, form=form
    )
    parity = (-1.0) ** bits.cumsum(1)[0, :, 0]
    torch.testing.assert_close(
        o[0, :, 0, 0], parity, atol=1e-4, rtol=0
    )  # |k| is 1 but for rounding


def test_steps_are_tokens_that_nobody_reads():
    q, beta = torch.randn(2, 70, 3, 8), torch.rand(2, 210, 3)
    k, v, g = unit_keys(2, 210, 3, 8), torch.randn(2, 210, 3, 5), -torch.rand(2, 70, 3)
    queries, decays = torch.zeros(2, 210, 3, 8), torch.zeros(2, 210, 3)
    queries[:, 2::3], decays[:, ::3] = q, g
    o, _ = delta_rule(queries, k, v, beta, decays)
    torch.testing.assert_close(delta_rule(q, k, v, beta, g, steps=3)[0], o[:, 2::3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axes", [(3,), (3, 8)])
def test_a_gate_of_minus_infinity_starts_a_new_text(form, axes):
    q, k, v = torch.randn(1, 90, 3, 8), unit_keys(1, 90, 3, 8), torch.randn(1, 90, 3, 5)
    beta, g = torch.rand(1, 90, 3), -torch.rand(1, 90, *axes)
    g[:, 40] = -torch.inf
    o, _ = delta_rule(q, k, v, beta, g, form=form)
    alone, _ = delta_rule(*(x[:, 40:] for x in (q, k, v, beta, g)), form=form)
    torch.testing.assert_close(o[:, 40:], alone)


def test_heads_of_a_group_read_the_same_keys():
    q, k = torch.randn(1, 70, 2, 8), unit_keys(1, 70, 2, 8)
    v, beta, g = torch.randn(1, 70, 6, 5), torch.rand(1, 70, 6), -torch.rand(1, 70, 6)
    copies = [x.repeat_interleave(3, dim=2) for x in (q, k)]
    torch.testing.assert_close(delta_rule(q, k, v, beta, g)[0], delta_rule(*copies, v, beta, g)[0])
    with pytest.raises(ShapeError, match="`q` and `k` have 2 heads, `v` has 5"):
        delta_rule(q, k, v[:, :, :5], beta[:, :, :5])


def test_qk_l2norm_divides_by_the_lengths():
    q, k, v = torch.randn(1, 70, 2, 8), torch.randn(1, 70, 2, 8), torch.randn(1, 70, 2, 5)
    beta = torch.rand(1, 70, 2)
    normal = delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta)[0]
    torch.testing.assert_close(delta_rule(q, k, v, beta, qk_l2norm=True)[0], normal)


def test_a_long_text_of_reflections_stays_right():
    q, k = torch.randn(1, 3000, 1, 16), unit_keys(1, 3000, 1, 16)
    v, beta = torch.randn(1, 3000, 1, 16), torch.full((1, 3000, 1), 2.0)
    beta[:, ::7] = 0.5
    exact = delta_rule(*(x.double() for x in (q, k, v, beta)), form="definition")[0]
    assert float((delta_rule(q, k, v, beta)[0] - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.full((1, 6, 2), 2.1)}, "`beta` runs from 2.1 to 2.1, wanted"),
        ({"beta": torch.full((1, 6, 2), torch.nan)}, "`beta` runs"),
        ({"beta": torch.full((1, 6, 2), -0.1)}, "`beta` runs from -0.1"),
        ({"g": torch.full((1, 6, 2), 0.1)}, "`g` reaches 0.1"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    x = torch.zeros(1, 6, 2, 4)
    given = {"q": x, "k": x, "v": x, "beta": torch.zeros(1, 6, 2), **change}
    with pytest.raises(RangeError, match=message):
        delta_rule(**given)
