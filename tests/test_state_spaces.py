"""State spaces and convolutions: what ties them to one another, beyond the laws that each keeps by itself."""

import pytest
import torch
import torch.nn.functional as F

from seqmix.core.errors import RangeError, ShapeError
from seqmix.ops import (
    OPERATORS,
    diagonal_scan,
    linear_attention,
    long_convolution,
    record_forms,
    selective_scan,
    short_convolution,
    signed_selective_scan,
    state_space_dual,
)

NAMES = [
    "diagonal_scan",
    "long_convolution",
    "selective_scan",
    "short_convolution",
    "state_space_dual",
]


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_state_space_dual_is_linear_attention_with_the_keys_of_each_group_repeated():
    x, dt, A = normal(2, 70, 6, 5), normal(2, 70, 6).exp(), -normal(6).exp()
    B, C = normal(2, 70, 2, 4), normal(2, 70, 2, 4)
    y, state = state_space_dual(x, dt, A, B, C, output_final_state=True)
    k, q = (maps.repeat_interleave(3, dim=2) for maps in (B, C))
    o, final = linear_attention(q, k, dt[..., None] * x, dt * A, scale=1.0, output_final_state=True)
    torch.testing.assert_close(y, o)
    torch.testing.assert_close(state, final)


def test_selective_scan_of_state_width_one_is_a_diagonal_scan():
    u, delta, A = normal(2, 70, 6), normal(2, 70, 6).exp(), -normal(6, 1).exp()
    ones = torch.ones(2, 70, 1, dtype=torch.float64)
    y, _ = selective_scan(u, delta, A, ones, ones)
    h, _ = diagonal_scan(delta * u, delta * A[:, 0])
    torch.testing.assert_close(y, h)


@pytest.mark.parametrize("length", [5, 32, 90])
def test_a_constant_decay_is_a_convolution_with_its_powers(length):
    x, a = normal(2, 90, 6), -normal(6).exp()
    powers = (a[:, None] * torch.arange(length)).exp()
    h, _ = diagonal_scan(x, a.expand_as(x))
    if length < 90:  # the kernel forgets what is older: take away what came from there
        h[:, length:] -= (a * length).exp() * h[:, :-length].clone()
    torch.testing.assert_close(long_convolution(x, powers), h)


def test_short_and_long_convolution_agree_on_a_short_kernel():
    x, kernel = normal(2, 40, 6), normal(6, 7)
    torch.testing.assert_close(short_convolution(x, kernel.flip(1))[0], long_convolution(x, kernel))


def test_kernel_length_chooses_the_form_of_a_convolution():
    x = torch.randn(1, 100, 4)
    for length, form in ((32, "direct"), (33, "fft")):
        with record_forms() as forms:
            long_convolution(x, torch.randn(4, length))
        assert forms == {("long_convolution", form)}
    for window, form in ((8, "shifted"), (9, "conv1d")):  # without compiled kernels
        with record_forms() as forms:
            short_convolution(x.double(), normal(4, window))
        assert forms == {("short_convolution", form)}


def test_history_of_a_text_shorter_than_the_window_keeps_what_was_not_pushed_out():
    x, history = normal(1, 2, 3), normal(1, 4, 3)
    _, state = short_convolution(x, normal(3, 5), initial_state=history, output_final_state=True)
    assert torch.equal(state, torch.cat([history[:, 2:], x], dim=1))


def test_negative_eigenvalues_let_a_state_flip_at_every_token():
    delta, A = torch.full((1, 6, 1), 1e3), -torch.ones(1, 1)
    once = torch.tensor([1.0, 0, 0, 0, 0, 0]).reshape(1, 6, 1)
    ones = torch.ones(1, 6, 1)
    flips = torch.tensor([1.0, -1, 1, -1, 1, -1]) * 1e3
    y, _ = signed_selective_scan(once, delta, A, ones, ones)
    assert torch.equal(y.flatten(), flips)
    y, _ = state_space_dual(
        once[..., None], delta, A[0], ones[..., None], ones[..., None], negative_eigenvalues=True
    )
    assert torch.equal(y.flatten(), flips)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_into_an_operator(name):
    operator = OPERATORS.get(name)
    inputs = operator.sample(operator.cases[0], torch.Generator().manual_seed(0))
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}

    def run():
        result = operator.function(**inputs)
        return result[0] if operator.has_state else result

    wanted = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    for one, other in [
        (got, wanted),
        *zip(gradients(got, inputs), gradients(wanted, inputs), strict=True),
    ]:
        assert torch.equal(one, other)


def gradients(y, inputs):
    return torch.autograd.grad(y.sum(), [*inputs.values()])


def test_selective_scan_keeps_one_state_per_chunk_for_its_backward():
    batch, length, channels, width = 1, 512, 64, 64
    kept = []
    inputs = [
        torch.randn(batch, length, channels),
        F.softplus(torch.randn(batch, length, channels)),
        -torch.rand(channels, width),
        torch.randn(batch, length, width),
        torch.randn(batch, length, width),
    ]
    inputs = [x.requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        selective_scan(*inputs)
    states = batch * length * channels * width
    assert sum(kept) < states / 4


WRONG = {
    "growing": (RangeError, "`A`", lambda i: {"A": -i["A"]}),
    "no decay rate": (RangeError, "finite", lambda i: {"A": i["A"] * torch.inf}),
    "negative step": (RangeError, "delta_softplus=True", lambda i: {"delta": -i["delta"]}),
    "step that is no number": (RangeError, "`delta`", lambda i: {"delta": i["delta"] * torch.nan}),
}


@pytest.mark.parametrize("what", WRONG)
def test_selective_scan_refuses(what):
    operator = OPERATORS.get("selective_scan")
    inputs = operator.sample(operator.cases[0], torch.Generator().manual_seed(0))
    error, named, change = WRONG[what]
    with pytest.raises(error, match=named):
        selective_scan(**{**inputs, **change(inputs)})


def test_groups_must_divide_the_heads():
    x, maps = torch.randn(1, 5, 6, 4), torch.randn(1, 5, 4, 3)
    with pytest.raises(ShapeError, match="4 groups, `x` has 6 heads"):
        state_space_dual(x, torch.rand(1, 5, 6), -torch.rand(6), maps, maps)


def test_an_unknown_activation_is_refused():
    with pytest.raises(RangeError, match="'gelu'"):
        short_convolution(torch.randn(1, 5, 3), torch.randn(3, 4), activation="gelu")


def test_a_growing_diagonal_scan_is_refused():
    with pytest.raises(RangeError, match="`a`"):
        diagonal_scan(torch.randn(1, 5, 3), torch.full((1, 5, 3), 0.1))
