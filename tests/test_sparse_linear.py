"""Block-sparse layers: the same function as the masked layer they come from, in float32 and nearly in 8 bits."""

import pytest
import torch
from torch import nn

from seqmix.core.errors import ConfigError, DtypeError, RangeError, ShapeError
from seqmix.core.numerics import relative_error
from seqmix.kernels import ISA
from seqmix.layers.sparse_linear import (
    QuantizedSparseLinear,
    SparseLinear,
    largest_blocks,
    sparsify,
)
from seqmix.ops import quantized_sparse_matmul, record_forms, sparse_matmul
from seqmix.ops.quantized_sparse_matmul import quantize_tokens


def linear(inputs=48, outputs=32, *, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(inputs, outputs, bias=bias)


def masked(layer, mask, block):
    copy = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    copy.load_state_dict(layer.state_dict())
    full = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    copy.weight.data *= full
    return copy


@pytest.mark.parametrize("block", [(4, 1), (1, 1), (16, 1), (4, 4), (32, 48), (2, 3)])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 1.0])
def test_it_computes_what_the_masked_layer_does(block, sparsity):
    layer = linear()
    mask = largest_blocks(layer.weight.detach(), sparsity, block)
    wanted = masked(layer, mask, block)
    x = torch.randn(2, 3, 5, 48)
    for sparse in (
        SparseLinear.from_linear(layer, mask=mask, block=block),
        SparseLinear.from_linear(layer, sparsity=sparsity, block=block),
    ):
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), wanted(x))
        assert sparse.to_linear().weight.equal(wanted.weight)


def test_the_largest_blocks_stay():
    weight = torch.zeros(8, 6)
    weight[4:, 2] = 1.0
    weight[:4, 5] = -2.0
    mask = largest_blocks(weight, 10 / 12)
    assert mask.nonzero().tolist() == [[0, 5], [1, 2]]


@pytest.mark.parametrize("tokens", [1, 15, 17, 64, 65, 129, 700])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_token_is_computed_whatever_their_number_and_the_threads(tokens, threads):
    layer = linear(outputs=260)
    x = torch.randn(tokens, 48)
    sparse = SparseLinear.from_linear(layer, sparsity=0.5)
    wanted = sparse.to_linear()(x).detach()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), wanted)
            assert relative_error(sparse.quantized()(x), wanted) < 0.02
    finally:
        torch.set_num_threads(before)


def test_eight_bits_lose_about_a_hundredth_and_no_more_than_rounding_does():
    sparse = SparseLinear.from_linear(linear(512, 64), sparsity=0.8)
    quantized = sparse.quantized()
    x = torch.randn(20, 512)
    whole, factor = quantize_tokens(x)
    weight = sparse.to_linear().weight.detach()
    rounded = (weight / quantized.scales[:, None]).round() * quantized.scales[:, None]
    exact = (whole * factor).double() @ rounded.double().T + quantized.bias
    with torch.no_grad():
        assert relative_error(quantized(x), exact) < 1e-6
        assert relative_error(quantized(x), sparse(x)) < 0.02


def test_tokens_of_nothing_give_the_bias_and_strange_ones_nan():
    quantized = SparseLinear.from_linear(linear(), sparsity=0.5).quantized()
    x = torch.randn(4, 48)
    x[0], x[1], x[2, 3] = 0.0, 1e-33, torch.inf
    y = quantized(x)
    assert y[0].equal(quantized.bias)
    assert y[1].equal(quantized.bias)
    assert y[2].isnan().all()
    assert y[3].isfinite().all()


@pytest.mark.parametrize("quantized", [False, True])
def test_state_dicts_carry_their_own_pattern(quantized):
    layers = [SparseLinear.from_linear(linear(), sparsity=s) for s in (0.9, 0.3)]
    if quantized:
        layers = [layer.quantized() for layer in layers]
    x = torch.randn(3, 48)
    with torch.no_grad():
        assert not layers[0](x).equal(layers[1](x))
        layers[0].load_state_dict(layers[1].state_dict())
        assert layers[0](x).equal(layers[1](x))


def test_gradients_reach_the_blocks_through_the_dense_form():
    sparse = SparseLinear.from_linear(linear(), sparsity=0.5)
    x = torch.randn(3, 48, requires_grad=True)
    with record_forms() as forms:
        sparse(x).square().sum().backward()
    assert forms == {("sparse_matmul", "dense")}
    wanted = sparse.to_linear()
    same = x.detach().clone().requires_grad_()
    wanted(same).square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)
    mask = largest_blocks(linear().weight.detach(), 0.5)
    kept = wanted.weight.grad.unflatten(0, (-1, 4)).transpose(1, 2)[mask]
    torch.testing.assert_close(sparse.blocks.grad[..., 0], kept)


@pytest.mark.skipif(ISA is None, reason="there are no compiled kernels")
def test_inference_is_compiled():
    sparse = SparseLinear.from_linear(linear(), sparsity=0.5)
    with record_forms() as forms, torch.no_grad():
        sparse(torch.randn(3, 48))
        sparse.quantized()(torch.randn(3, 48))
    assert {form for _, form in forms} == {"native"}


def test_a_model_is_made_sparse_in_place():
    model = nn.Sequential(linear(48, 64), nn.ReLU(), nn.ModuleDict({"head": linear(64, 6)}))
    with pytest.raises(ConfigError, match="divide"):
        sparsify(model, 0.5)
    assert type(model[0]) is nn.Linear
    sparsify(model, 0.5, only=lambda name, linear: name != "2.head")
    assert type(model[0]) is SparseLinear
    assert type(model[2]["head"]) is nn.Linear
    whole = sparsify(nn.Sequential(linear()), 0.5, quantized=True)
    assert type(whole[0]) is QuantizedSparseLinear


def test_what_does_not_fit_is_refused():
    layer = linear()
    with pytest.raises(ConfigError, match="divide"):
        SparseLinear.from_linear(layer, sparsity=0.5, block=(5, 1))
    with pytest.raises(ConfigError, match="either mask or sparsity"):
        SparseLinear.from_linear(layer)
    with pytest.raises(ShapeError, match="`mask`"):
        SparseLinear.from_linear(layer, mask=torch.ones(3, 3))
    with pytest.raises(RangeError, match="sparsity"):
        SparseLinear.from_linear(layer, sparsity=1.5)
    with pytest.raises(ConfigError, match="multiple of 4"):
        SparseLinear.from_linear(linear(8, 6), sparsity=0.5, block=(2, 1)).quantized()
    with pytest.raises(ShapeError, match="47 channels, wanted 48"):
        SparseLinear.from_linear(layer, sparsity=0.5)(torch.zeros(2, 47))


def pattern(**changes):
    arguments = {
        "x": torch.randn(1, 3, 6),
        "blocks": torch.randn(3, 2, 1),
        "columns": torch.tensor([0, 5, 2]),
        "offsets": torch.tensor([0, 1, 3]),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (RangeError, "`columns`", {"columns": torch.tensor([0, 6, 2])}),
        (RangeError, "`columns`", {"columns": torch.tensor([0, -1, 2])}),
        (RangeError, "`offsets`", {"offsets": torch.tensor([0, 1, 4])}),
        (RangeError, "`offsets`", {"offsets": torch.tensor([0, 4, 3])}),
        (RangeError, "`offsets`", {"offsets": torch.tensor([1, 1, 3])}),
        (ShapeError, "`columns`", {"columns": torch.tensor([0, 5])}),
        (ShapeError, "`offsets`", {"offsets": torch.tensor([0])}),
        (ShapeError, "`blocks`", {"blocks": torch.randn(3, 2, 4)}),
        (ShapeError, "`bias`", {"bias": torch.randn(5)}),
        (DtypeError, "`columns`", {"columns": torch.tensor([0.0, 5.0, 2.0])}),
    ],
)
def test_a_pattern_that_leaves_the_matrix_is_refused(error, match, changes):
    sparse_matmul(**pattern())
    with pytest.raises(error, match=match):
        sparse_matmul(**pattern(**changes))


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (DtypeError, "`blocks`", {"blocks": torch.zeros(2, 4, 4)}),
        (ShapeError, "`blocks`", {"blocks": torch.zeros(2, 4, 2, dtype=torch.int8)}),
        (ShapeError, "`scales`", {"scales": torch.ones(12)}),
        (RangeError, "`columns`", {"columns": torch.full((2, 4), 9)}),
    ],
)
def test_a_rounded_pattern_that_does_not_fit_is_refused(error, match, changes):
    arguments = {
        "x": torch.randn(1, 3, 9),
        "scales": torch.ones(8),
        "blocks": torch.ones(2, 4, 4, dtype=torch.int8),
        "columns": torch.zeros(2, 4, dtype=torch.int32),
        "offsets": torch.tensor([0, 1, 2]),
    }
    quantized_sparse_matmul(**arguments)
    with pytest.raises(error, match=match):
        quantized_sparse_matmul(**{**arguments, **changes})
