"""Compiled kernels beside what PyTorch knows of a tensor: derivatives, tracers, signs, versions, sizes, NaN."""

import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from seqmix.kernels import linear_attention as linear_kernel
from seqmix.kernels import missing
from seqmix.kernels._native import native
from seqmix.kernels.delta_rule import delta_rule as delta_kernel
from seqmix.kernels.selective_scan import selective_scan as scan_kernel
from seqmix.kernels.selective_scan import selective_scan_update
from seqmix.kernels.short_convolution import short_convolution_update
from seqmix.ops import (
    attention,
    delta_rule,
    diagonal_scan,
    int4_matmul,
    int8_matmul,
    linear_attention,
    short_convolution,
)

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
LENGTHS = [5, 20]  # without PyTorch's dispatcher, and with it


def qkv(length, heads=3, width=4):
    return [torch.randn(2, length, heads, width) for _ in "qkv"]


def reader(length):
    """Linear attention as a function of q alone."""
    _, k, v = qkv(length)
    return lambda q: linear_attention(q, k, v)[0]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by PyTorch itself
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_derivatives_are_not_lost(length):
    read, (q, direction, _) = reader(length), qkv(length)
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(read(forward_ad.make_dual(q, direction)))
    _, by_function = torch.func.jvp(read, (q,), (direction,))
    wanted = read(direction)  # linear in q
    torch.testing.assert_close(result.tangent, wanted)
    torch.testing.assert_close(by_function, wanted)


def test_accelerated_models_leave_forward_derivatives_to_pytorch():
    functions = pytest.importorskip("seqmix.convert._functions")
    assert functions.computed_here(torch.ones(1))
    with forward_ad.dual_level():
        assert not functions.computed_here(torch.ones(1))


@pytest.mark.parametrize("length", LENGTHS)
def test_transforms_of_functions_are_followed(length):
    read, q = reader(length), torch.randn(2, length, 3, 4, requires_grad=True)
    (wanted,) = torch.autograd.grad(read(q).square().sum(), q)
    got = torch.func.grad(lambda q: read(q).square().sum())(q.detach())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    many = torch.randn(3, 2, length, 3, 4)
    got = torch.func.vmap(read)(many)
    torch.testing.assert_close(got, torch.stack([read(one) for one in many]))


def test_a_tracer_sees_the_kernel():
    first, second, k, v = torch.randn(4, 2, 5, 3, 4)
    strengths = torch.full((2, 5, 3), 0.5)
    for compute in (
        lambda q: linear_attention(q, k, v, form="native")[0],
        lambda q: attention(q, k, v, form="native"),
        lambda q: delta_kernel(q, k, v, strengths, None, None)[0],  # past the check of its values
    ):
        torch.testing.assert_close(make_fx(compute)(first)(second), compute(second))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_sign_that_is_yet_to_be_changed_counts(length):
    q, k, v = qkv(length)
    g = torch.complex(torch.zeros(2, length, 3), torch.rand(2, length, 3)).conj().imag
    assert g.is_neg()
    strengths = torch.full((2, length, 3), 0.5)
    for compute in (
        lambda g: linear_attention(q, k, v, g, form="native")[0],
        lambda g: delta_rule(q, k, v, strengths, g, form="native")[0],
    ):
        torch.testing.assert_close(compute(g), compute(g.resolve_neg()))


def test_tensors_without_values_stay_so():
    with torch.device("meta"):
        q, k, v = (torch.empty(2, 5, 3, 4) for _ in "qkv")
    assert attention(q, k, v).device.type == "meta"
    assert linear_attention(q, k, v)[0].device.type == "meta"


@pytest.mark.parametrize("causal", [False, True])
def test_the_largest_window_is_none(causal):
    q, k, v = qkv(20)
    wide = attention(q, k, v, causal=causal, window=sys.maxsize, form="native")
    torch.testing.assert_close(wide, attention(q, k, v, causal=causal))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_decays_of_a_diagonal_scan_keep_their_dtype(dtypes):
    x, a = torch.randn(1, 9, 5), torch.rand(1, 9, 5) * -3
    x, a = (t.to(getattr(torch, d)) for t, d in zip((x, a), dtypes, strict=True))
    state = torch.randn(1, 5, requires_grad=True)
    results = []
    for form in ("native", "definition"):
        _, last = diagonal_scan(
            x, a.requires_grad_(), initial_state=state, output_final_state=True, form=form
        )
        results.append((last, *torch.autograd.grad(last.sum(), (state, a))))
    (last, grad_state, grad_a), wanted = results
    torch.testing.assert_close((last, grad_state), wanted[:2])
    assert grad_a.dtype == a.dtype
    torch.testing.assert_close(grad_a, wanted[2], rtol=1e-2, atol=1e-3)  # of h as it was rounded


def test_a_state_written_in_place_has_another_version():
    state, history = torch.randn(2, 6, 4), torch.randn(2, 3, 6)
    read = (state * torch.ones(2, 6, 4, requires_grad=True)).sum()
    u, maps = torch.randn(2, 6), torch.randn(2, 4)
    with torch.no_grad():
        selective_scan_update(state, u, u, -torch.rand(6, 4), maps, maps, delta_softplus=True)
        before = history._version
        short_convolution_update(torch.randn(2, 1, 6), history, torch.randn(6, 4))
    assert history._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.backward()


def test_sizes_that_do_not_fit_are_refused_before_memory_is_left():
    u, maps = torch.randn(1, 4, 6), torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match="B and C are"):
        scan_kernel(u, u, -torch.rand(6, 5), maps, maps, *[None] * 4, delta_softplus=True)
    four = torch.randn(1, 4, 4, 3)
    with pytest.raises(ValueError, match="groups divide"):
        scan_kernel(u, u, -torch.rand(6, 3), four, four, *[None] * 4, delta_softplus=True)
    with pytest.raises(ValueError, match="at least W - 1"):
        short_convolution_update(u, torch.randn(1, 2, 6), torch.randn(6, 4))
    with pytest.raises(ValueError, match="the weight is"):
        short_convolution_update(u, torch.randn(1, 3, 6), torch.randn(5, 4))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", ["head", "key"])
def test_a_decay_that_is_no_number_is_not_taken_for_one(shape, length):
    """In one head only: the others do not see it."""
    q, k, v = qkv(length)
    g = -torch.rand(2, length, 3, 4) if shape == "key" else -torch.rand(2, length, 3)
    clean = g.clone()
    g[0, 3, 1] = torch.nan
    strengths, options = torch.full((2, length, 3), 0.5), {"scale": None, "normalize": False}
    for compute in (
        lambda g: linear_kernel.linear_attention(q, k, v, g, None, cu_seqlens=None, **options)[0],
        lambda g: delta_kernel(q, k, v, strengths, g, None)[0],
    ):
        got, wanted = compute(g), compute(clean)
        assert got[0, 3:, 1].isnan().all()
        others = torch.ones(2, 3, dtype=torch.bool)
        others[0, 1] = False
        assert torch.equal(got.transpose(1, 2)[others], wanted.transpose(1, 2)[others])


def test_gradients_of_one_result_alone():
    u, maps = torch.randn(1, 40, 6, requires_grad=True), torch.randn(1, 40, 3)
    A = -torch.rand(6, 3)
    y, last = scan_kernel(u, u.detach(), A, maps, maps, *[None] * 4, delta_softplus=True)
    both = torch.autograd.grad(y.sum() + last.sum(), u, retain_graph=True)[0]
    apart = [torch.autograd.grad(part.sum(), u, retain_graph=True)[0] for part in (y, last)]
    torch.testing.assert_close(sum(apart), both)


def test_a_history_of_nothing():
    x = torch.randn(2, 5, 3)
    y, last = short_convolution(x, torch.ones(3, 1), form="native", output_final_state=True)
    assert torch.equal(y, x)
    assert last.shape == (2, 0, 3)


def few_bits(inputs, outputs, group):
    """Products with weights of 8 and of 4 bits, as functions of x [1, T, I]."""
    bytes_ = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    codes, factors = (
        torch.randint(256, (outputs, -(-count // 2)), dtype=torch.uint8)
        for count in (inputs, inputs // group)
    )
    scale = torch.rand(outputs)
    return (
        lambda x, **options: int8_matmul(x, bytes_, scale, **options),
        lambda x, **options: int4_matmul(x, codes, factors, scale, group=group, **options),
    )


@pytest.mark.parametrize("tokens", [1, 3, 7, 8, 9, 13, 97, 200])
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(320, 33, 32), (2005, 17, 5)])
def test_products_with_weights_of_few_bits_keep_tokens_apart(tokens, inputs, outputs, group):
    """For few tokens and for many, with groups that overlap at the end of a tile, in either dtype."""
    for multiply in few_bits(inputs, outputs, group):
        x = torch.randn(1, tokens, inputs)
        wanted = multiply(x, form="dense")
        got = multiply(x, form="native")
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
        halves = multiply(x.bfloat16(), form="native")
        assert halves.equal(multiply(x.bfloat16().float(), form="native").bfloat16())
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert multiply(turned, form="native").equal(got)
        x[0, tokens // 2, inputs // 3] = torch.nan
        spoilt = multiply(x, form="native")
        assert spoilt[0, tokens // 2].isnan().all()
        others = torch.arange(tokens) != tokens // 2
        assert spoilt[0, others].equal(got[0, others])


def test_weights_of_few_bits_that_do_not_fit_are_refused_before_memory_is_left():
    x, y, scale = torch.ones(1, 2, 64), torch.empty(1, 2, 3), torch.ones(3)
    room = torch.empty(native.weight_matmul_workspace(2, 64, 1))
    weight, codes, factors = (
        torch.zeros(3, width, dtype=dtype)
        for width, dtype in ((64, torch.int8), (32, torch.uint8), (1, torch.uint8))
    )
    with pytest.raises(ValueError, match="the weight is"):
        native.int8_matmul(x, weight[:2], scale, None, y, room, 1)
    with pytest.raises(ValueError, match="too small"):
        native.int8_matmul(x, weight, scale, None, y, room[1:], 1)
    with pytest.raises(ValueError, match="the codes are"):
        native.int4_matmul(x, codes[:, 1:], factors, scale, None, y, 32, room, 1)
    with pytest.raises(ValueError, match="the factors are"):
        native.int4_matmul(x, codes, factors, scale, None, y, 16, room, 1)
    with pytest.raises(ValueError, match="group divides"):
        native.int4_matmul(x, codes, factors, scale, None, y, 0, room, 1)
    with pytest.raises(ValueError, match="too small"):
        native.int4_matmul(x, codes, factors, scale, None, y, 32, room, 2)
    with pytest.raises(ValueError, match="at least one of everything"):
        native.int8_matmul(x[:, :0], weight, scale, None, y[:, :0], room, 1)
