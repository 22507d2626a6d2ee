"""What block-sparse attention and the choice of its blocks promise beyond the laws."""

import sys

import pytest
import torch

from seqmix.core.errors import DtypeError, RangeError, ShapeError
from seqmix.kernels import missing
from seqmix.ops import attention, block_sparse_attention
from seqmix.ops.block_sparse_attention import antidiagonal_mass, choose_blocks, lower_shares

FORMS = ["gathered", *(["native"] if missing() is None else [])]


def normal(*shape):
    return torch.randn(shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_all_blocks_are_full_attention(form, causal):
    q, k, v = normal(1, 300, 4, 16), normal(1, 300, 2, 16), normal(1, 300, 2, 16)
    blocks = torch.ones(4, 5, 5, dtype=torch.bool)
    got = block_sparse_attention(q, k, v, blocks, block=64, causal=causal, form=form)
    torch.testing.assert_close(got, attention(q, k, v, causal=causal, form="definition"))


@pytest.mark.parametrize("form", FORMS)
def test_keys_of_other_blocks_are_not_read(form):
    q, k, v = (normal(1, 96, 2, 8) for _ in range(3))
    blocks = torch.eye(3, dtype=torch.bool).expand(2, 3, 3)
    for x in (k, v):
        x[:, 32:64] = torch.nan
    o = block_sparse_attention(q, k, v, blocks, block=32, form=form)
    assert o[:, :32].isfinite().all()
    assert o[:, 64:].isfinite().all()


@pytest.mark.parametrize(("length", "keys"), [(64, 64), (61, 61), (30, 62)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_mass_is_summed_along_antidiagonals(length, keys, causal):
    block, stride = 16, 4
    q, k = normal(1, length, 4, 8), normal(1, keys, 2, 8)
    shift = (keys - length) // stride
    padded_q = torch.zeros(1, -(-length // block) * block, 4, 8)
    padded_k = torch.zeros(1, -(-keys // block) * block, 4, 8)
    padded_q[:, :length], padded_k[:, :keys] = q, k.repeat_interleave(2, dim=2)
    scores = torch.einsum("bthk,bshk->bhts", padded_q, padded_k) * 8**-0.5
    rows, columns = scores.shape[2] // stride, scores.shape[3] // stride
    sums = torch.zeros(1, 4, rows, columns)
    for i in range(stride):
        sums += scores[:, :, stride - 1 - i :: stride, i::stride]
    place = torch.arange(columns)
    hidden = place >= -(-keys // stride)
    if causal:
        hidden = hidden | (place > torch.arange(rows)[:, None] + shift)
    share = (sums / stride).masked_fill(hidden, -torch.inf).softmax(-1)
    share[:, :, -(-length // stride) :] = 0
    wide = block // stride
    mass = share.unflatten(3, (-1, wide)).sum(-1).unflatten(2, (-1, wide)).sum(3)
    got = antidiagonal_mass(q, k, block=block, stride=stride, causal=causal)
    torch.testing.assert_close(got, mass / mass.sum(-1, keepdim=True))


def test_the_mass_does_not_depend_on_how_much_is_computed_at_once(monkeypatch):
    q, k = normal(2, 200, 4, 8), normal(2, 200, 2, 8)
    whole = antidiagonal_mass(q, k, block=16, stride=4)
    monkeypatch.setattr(sys.modules[antidiagonal_mass.__module__], "SCORES_AT_ONCE", 1)
    torch.testing.assert_close(antidiagonal_mass(q, k, block=16, stride=4), whole)


def test_the_fewest_blocks_with_the_share_are_chosen():
    mass = torch.tensor([0.5, 0.05, 0.3, 0.15]).expand(1, 2, 1, 4)
    got = choose_blocks(mass, torch.tensor([0.75, 0.9]), causal=False)[0, :, 0].tolist()
    assert got == [[True, False, True, False], [True, False, True, True]]
    assert choose_blocks(mass, 1.0, causal=False).all()


def test_the_first_and_the_own_block_are_always_chosen_and_later_ones_never():
    mass = torch.rand(1, 3, 6, 6).tril()
    mass = mass / mass.sum(-1, keepdim=True)
    blocks = choose_blocks(mass, 0.0)
    wanted = torch.eye(6, dtype=torch.bool)
    wanted[:, 0] = True
    assert torch.equal(blocks, wanted.expand_as(blocks))
    held = (choose_blocks(mass, 0.9) * mass).sum(-1)
    assert (held >= 0.9 - 1e-6).all()
    assert not choose_blocks(mass, 1.0).triu(1).any()


def test_shares_are_lowered_where_it_costs_least():
    quality = torch.tensor([[1.0, 0.9, 0.1], [1.0, 0.99, 0.95], [1.0, 0.5, 0.45]])
    assert lower_shares(quality, 0).tolist() == [0, 0, 0]
    assert lower_shares(quality, 2).tolist() == [0, 2, 0]
    assert lower_shares(quality, 3).tolist() == [1, 2, 0]
    every = [(a, b, c) for a in range(3) for b in range(3) for c in range(3) if a + b + c == 4]
    best = max(every, key=lambda way: sum(float(quality[h, a]) for h, a in enumerate(way)))
    assert tuple(lower_shares(quality, 4).tolist()) == best
    with pytest.raises(RangeError, match="`steps` is 7"):
        lower_shares(quality, 7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocks": torch.ones(2, 2, 3, dtype=torch.bool)}, ShapeError, "`blocks` has shape"),
        ({"blocks": torch.ones(2, 2, 2)}, DtypeError, "`blocks` must be"),
        ({"block": 0}, RangeError, "`block` is 0"),
        ({"q": torch.zeros(1, 70, 2, 8)}, ShapeError, "wanted at least 70"),
    ],
)
def test_impossible_arguments_are_refused(change, error, message):
    q = torch.zeros(1, 64, 2, 8)
    given = {"q": q, "k": q, "v": q, "blocks": torch.ones(2, 2, 2, dtype=torch.bool), "block": 32}
    with pytest.raises(error, match=message):
        block_sparse_attention(**{**given, **change})


def test_a_stride_that_does_not_divide_the_block_is_refused():
    q = torch.zeros(1, 64, 2, 8)
    with pytest.raises(RangeError, match="`stride` is 5"):
        antidiagonal_mass(q, q, block=32, stride=5)
    with pytest.raises(ShapeError, match="whole blocks"):
        antidiagonal_mass(q[:, :60], q, block=32, stride=4)
