"""Compiled scans and short convolutions: layouts, groups, threads and states written in place."""

import pytest
import torch

from seqmix.kernels import missing
from seqmix.kernels.selective_scan import selective_scan as native_scan
from seqmix.kernels.selective_scan import selective_scan_update
from seqmix.kernels.short_convolution import short_convolution as native_convolution
from seqmix.kernels.short_convolution import short_convolution_update
from seqmix.ops import diagonal_scan, selective_scan, short_convolution, signed_selective_scan

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CHANNELS, STATES = (
    70,
    5,
)  # a whole piece of channels and a part of one, a whole step of states and a part


def scan_inputs(batch, length, groups=None):
    maps = (batch, length, STATES) if groups is None else (batch, length, groups, STATES)
    return {
        "u": torch.randn(batch, length, CHANNELS),
        "delta": torch.randn(batch, length, CHANNELS),
        "A": -torch.rand(CHANNELS, STATES) * 4,
        "B": torch.randn(maps),
        "C": torch.randn(maps),
        "D": torch.randn(CHANNELS),
        "z": torch.randn(batch, length, CHANNELS),
        "delta_bias": torch.randn(CHANNELS),
        "initial_state": torch.randn(batch, CHANNELS, STATES),
    }


def scan(inputs, **options):
    return native_scan(**inputs, delta_softplus=True, **options)


def gradients(function, inputs):
    """Results and gradients of all inputs, for random gradients of the results."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    results = function(inputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    return [*results, *torch.autograd.grad(results, [*inputs.values()], weights)]


def time_contiguous(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("length", [1, 7, 70])
def test_a_layout_with_time_contiguous_is_kept_and_gives_the_same(length):
    inputs = scan_inputs(2, length)
    turned = {n: time_contiguous(x) if n in "u delta B C z" else x for n, x in inputs.items()}
    got, wanted = gradients(scan, turned), gradients(scan, inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    x, weight, bias = inputs["u"], torch.randn(CHANNELS, 4), torch.randn(CHANNELS)

    def convolve(given):
        return native_convolution(**given, bias=bias, initial_state=None, activation="silu")

    for one, other in zip(
        gradients(convolve, {"x": time_contiguous(x), "weight": weight}),
        gradients(convolve, {"x": x, "weight": weight}),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    if length > 1:
        assert got[0].stride() == time_contiguous(x).stride()
        assert convolve({"x": time_contiguous(x), "weight": weight})[0].stride(1) == 1


@pytest.mark.parametrize("negative", [False, True])
def test_groups_of_channels_have_maps_of_their_own(negative):
    inputs = scan_inputs(2, 40, groups=2)
    half = CHANNELS // 2

    def whole(given):
        return scan(given, negative=negative)

    def apart(given):
        parts = []
        for group in range(2):
            own = slice(group * half, (group + 1) * half)
            part = {n: given[n][..., own] for n in ("u", "delta", "D", "z", "delta_bias")}
            part |= {n: given[n][:, :, group] for n in ("B", "C")}
            part |= {"A": given["A"][own], "initial_state": given["initial_state"][:, own]}
            parts.append(scan(part, negative=negative))
        ys, states = zip(*parts, strict=True)
        return torch.cat(ys, dim=-1), torch.cat(states, dim=1)

    for one, other in zip(gradients(whole, inputs), gradients(apart, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_the_number_of_threads_changes_no_bit():
    inputs, threads = scan_inputs(3, 70), torch.get_num_threads()
    x, weight = inputs["u"], torch.randn(CHANNELS, 4)

    def everything():
        convolved = gradients(
            lambda i: native_convolution(**i, bias=None, initial_state=None),
            {"x": x, "weight": weight},
        )
        return gradients(scan, inputs) + convolved

    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(3)
        together = everything()
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("layout", ["rows", "strided"])
def test_a_state_written_in_place_is_the_state_of_the_scan(signed, layout):
    inputs = scan_inputs(2, 6)
    state = inputs["initial_state"].clone()
    if layout == "strided":
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    function = signed_selective_scan if signed else selective_scan
    wanted, last = function(**inputs, delta_softplus=True, output_final_state=True)
    fixed = {n: inputs[n] for n in ("A", "D", "delta_bias")}
    for t in range(6):
        token = {n: inputs[n][:, t] for n in ("u", "delta", "B", "C", "z")}
        y = selective_scan_update(state, **token, **fixed, delta_softplus=True, negative=signed)
        torch.testing.assert_close(y, wanted[:, t])
    torch.testing.assert_close(state, last)


def test_a_state_in_bfloat16_is_rounded_once_per_token():
    inputs = scan_inputs(2, 1, groups=2)
    state = inputs.pop("initial_state").bfloat16()
    wanted, last = scan({**inputs, "initial_state": state})
    token = {n: x[:, 0] if x.shape[0] == 2 else x for n, x in inputs.items()}
    y = selective_scan_update(state, **token, delta_softplus=True)
    torch.testing.assert_close(y, wanted[:, 0])
    assert torch.equal(state, last.bfloat16())


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("held", [3, 4, 6])
def test_a_history_written_in_place_is_shifted(held, length):
    x, weight, bias = torch.randn(2, length, CHANNELS), torch.randn(CHANNELS, 4), torch.randn(70)
    state = torch.randn(2, CHANNELS, held)
    before = torch.cat([state.transpose(1, 2), x], dim=1)
    wanted, _ = short_convolution(
        x, weight, bias, activation="silu", initial_state=before[:, held - 3 : held]
    )
    y = short_convolution_update(x, state.transpose(1, 2), weight, bias, activation="silu")
    torch.testing.assert_close(y, wanted)
    assert torch.equal(state.transpose(1, 2), before[:, length:])


def test_custom_operators_are_described_rightly():
    inputs = scan_inputs(2, 5, groups=2)
    given = (*inputs.values(), None, True, False, True)
    token = {n: x[:, 0] if n in "u delta B C z" else x for n, x in inputs.items()}
    state = token.pop("initial_state")
    x, weight = torch.randn(2, 5, 6), torch.randn(6, 4)
    history = torch.randn(2, 3, 6)
    for name, arguments in {
        "selective_scan": given,
        "selective_scan_update": (state, *token.values(), True, False),
        "short_convolution": (x, weight, None, history, None, True),
        "short_convolution_update": (x, history, weight, None, True),
        "diagonal_scan": (x, -x.abs(), torch.zeros(2, 6), None),
    }.items():
        needs = [
            a.clone().requires_grad_()
            if isinstance(a, torch.Tensor) and "update" not in name
            else a
            for a in arguments
        ]
        torch.library.opcheck(getattr(torch.ops.seqmix, name).default, tuple(needs))


@pytest.mark.parametrize("channels", [3, 16, 70])
def test_a_diagonal_scan_takes_any_number_of_channels(channels):
    x, a = torch.randn(2, 9, channels), -torch.rand(2, 9, channels)
    got, wanted = (diagonal_scan(x, a, form=form)[0] for form in ("native", "definition"))
    torch.testing.assert_close(got, wanted)
