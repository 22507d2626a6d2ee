"""What single mixers and channel mixers promise beyond the laws that all are held to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seqmix.channels import CHANNELS
from seqmix.core.numerics import relative_error
from seqmix.core.state import leaves
from seqmix.mixers import MIXERS
from seqmix.mixers._mixer import undecayed
from seqmix.mixers.s4d import initial_frequencies
from seqmix.ops.signed_selective_scan import signed_selective_scan
from seqmix.ops.state_space_dual import state_space_dual


def build(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    kind = (CHANNELS if name in CHANNELS else MIXERS).get(name)
    return kind(kind.Config(**fields))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", MIXERS.names())
def test_what_is_kept_from_weight_decay_exists(name: str) -> None:
    mixer = build(name)
    assert undecayed(mixer) <= {name for name, _ in mixer.named_parameters()}


def test_retention_depends_on_distances_alone() -> None:
    """Against the masked matrix of the paper with absolute places, in two pieces, the second far along."""
    mixer, x = build("retention", width=16, heads=2).double(), normal(1, 40, 16)
    head, state = mixer(x[:, :33])
    tail, _ = mixer(x[:, 33:], state)
    q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (mixer.query, mixer.key, mixer.value))
    turned = 10000.0 ** -torch.linspace(0, 1, 4, dtype=torch.float64)
    phase = torch.exp(1j * (1000 + torch.arange(40.0)).double()[:, None] * turned)[None, :, None]
    q, k = (torch.complex(*part.chunk(2, dim=-1)) * phase for part in (q, k))
    distance = torch.arange(40.0)[:, None] - torch.arange(40.0)
    decay = 1 - 2.0 ** -(5 + torch.arange(2.0).double())
    weight = torch.where(distance >= 0, decay[:, None, None] ** distance.clamp_min(0), 0.0)
    scores = torch.einsum("bthc,bshc->bhts", q, k.conj()).real * weight / math.sqrt(8)
    o = mixer.norm(torch.einsum("bhts,bshv->bthv", scores, v)).flatten(-2)
    wanted = mixer.output(o * torch.nn.functional.silu(mixer.gate(x)))
    # The decay is 1 - 2^(-5-h) to the digits of float32, in which mixers compute it.
    assert relative_error(torch.cat([head, tail], dim=1), wanted) < 1e-6


def test_hedgehog_reads_a_window_by_softmax_and_the_rest_by_features() -> None:
    mixer, x = build("hedgehog", width=16, heads=2, window=4).double(), normal(1, 11, 16)
    torch.nn.init.normal_(mixer.window_gate)
    q, k, v = mixer.project(x)
    q, k = mixer.turn(q, k, torch.arange(11))
    scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(8)
    features = torch.einsum("bthc,bshc->bhts", mixer.query_features(q), mixer.key_features(k))
    distance = torch.arange(11)[:, None] - torch.arange(11)
    near = (distance >= 0) & (distance < 4)
    largest = scores.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
    share = mixer.window_gate.sigmoid()[:, None, None]
    weights = torch.where(near, share * (scores - largest).exp(), features * (distance >= 4))
    o = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
    assert relative_error(mixer(x)[0], mixer.output(o.flatten(-2))) < 1e-6


def test_s4d_legs_has_the_frequencies_of_hippo() -> None:
    size = 16
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    hippo = -torch.outer(root, root).tril(-1) - torch.diag(n + 1)
    half = (n + 0.5).sqrt()
    eigenvalues = torch.linalg.eigvals(hippo + torch.outer(half, half))
    assert torch.allclose(eigenvalues.real, torch.tensor(-0.5, dtype=torch.float64))
    wanted = eigenvalues.imag.sort().values[size // 2 :]
    assert torch.allclose(initial_frequencies("legs", size // 2), wanted)


@pytest.mark.parametrize("initial", ["lin", "inv", "legs"])
def test_s4d_keeps_its_digits_over_a_long_text(initial: str) -> None:
    """The recurrence token by token in float64 against the convolution in float32, to the last state."""
    mixer, x = build("s4d", width=4, state_width=32, initial=initial), normal(1, 3000, 4)
    with torch.no_grad():
        y, state = mixer(x.float())
        exact, state_exact = mixer.double()(x[:, :1])
        pieces = [exact]
        for t in range(1, 3000):
            exact, state_exact = mixer(x[:, t : t + 1], state_exact)
            pieces.append(exact)
    assert relative_error(y, torch.cat(pieces, dim=1)) < 1e-5
    assert relative_error(state["recurrent"], state_exact["recurrent"]) < 1e-5


def test_hyena_weighs_a_distance_the_same_at_every_length() -> None:
    mixer = build("hyena", width=8, reach=16)
    whole = mixer.kernel(5000)
    assert torch.allclose(mixer.kernel(20), whole[:, :20], atol=1e-6)
    assert whole.isfinite().all()
    assert whole[:, 1000:].abs().max() < 1e-6, "it fades beyond its reach"


def test_negative_eigenvalues_count_modulo_two() -> None:
    """One number of state that flips at every 1 and stays at every 0 holds the parity of the bits."""
    bits = torch.randint(2, (1, 200), generator=torch.Generator().manual_seed(2)).double()
    parity = bits.cumsum(1) % 2
    flip = 40.0 * bits  # exp(-40) = 0: the transition is -1
    one, state = (
        torch.ones(1, 200, 1, dtype=torch.float64),
        torch.ones(1, 1, 1, dtype=torch.float64),
    )
    rate = -torch.ones(1, 1, dtype=torch.float64)
    y, _ = signed_selective_scan(0 * one, flip.unsqueeze(-1), rate, one, one, initial_state=state)
    assert torch.allclose(y[..., 0], 1 - 2 * parity)
    arguments = {"negative_eigenvalues": True, "initial_state": state.unsqueeze(-1)}
    one = one.unsqueeze(-1)
    y, _ = state_space_dual(0 * one, flip.unsqueeze(-1), rate[0], one, one, **arguments)
    assert torch.allclose(y[..., 0, 0], 1 - 2 * parity)


def load(channel: Any, x: Tensor) -> Tensor:
    score = torch.sigmoid(channel.router(x)) + channel.balance
    chosen = score.topk(channel.config.active, dim=-1).indices
    return torch.bincount(chosen.flatten(), minlength=channel.config.experts) / x.shape[0]


def test_training_spreads_tokens_over_experts() -> None:
    channel = build("mixture_of_experts", width=16, experts=8, balance_rate=0.01)
    x = normal(512, 16).float() + 1.0  # a common direction, which some experts like better
    before = load(channel, x)
    for _ in range(100):
        channel(x.unsqueeze(0)).sum().backward()
    after = load(channel, x)
    assert (after - 0.25).abs().max() < 0.5 * (before - 0.25).abs().max()
    balance = channel.balance.clone()
    channel.eval()(x.unsqueeze(0)).sum().backward()
    assert channel.balance.equal(balance), "evaluation must leave the balance alone"


def test_the_cost_of_experts_counts_the_active_ones() -> None:
    few, many = (
        build("mixture_of_experts", width=16, experts=experts, active=2) for experts in (4, 16)
    )
    router = 2 * 64 * 16 * (16 - 4)
    assert many.cost(64).flops - few.cost(64).flops == router
    more = build("mixture_of_experts", width=16, experts=4, active=3)
    assert more.cost(64).flops > few.cost(64).flops


@pytest.mark.parametrize(
    "name",
    [
        "linear_attention",
        "retention",
        "gated_linear_attention",
        "hgrn2",
        "mamba",
        "mamba2",
        "gated_delta_net",
        "s4d",
        "hyena",
    ],
)
def test_mixed_precision_is_near(name: str) -> None:
    """Weights in float32, products in bfloat16, as in training; warnings are errors here."""
    mixer, x = build(name, width=32), normal(2, 50, 32).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(x)
    wanted, exact = mixer(x)
    assert relative_error(y, wanted) < 0.02
    for leaf, wanted in zip(leaves(state), leaves(exact), strict=True):
        assert leaf.dtype == torch.float32
        assert relative_error(leaf, wanted) < 0.02
