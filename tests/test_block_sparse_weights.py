"""Block-sparse layers: the same function as the masked layer they come from, in float32 and nearly in 8 bits."""

import copy

import pytest
import torch
from torch import nn

from seqmix.compress import Calibration, Work, parse_recipe
from seqmix.compress.block_sparse import made_sparse
from seqmix.core.errors import ConfigError, DtypeError, RangeError, ShapeError
from seqmix.core.numerics import relative_error
from seqmix.kernels import ISA
from seqmix.linears.block_sparse import BlockSparse, largest_blocks
from seqmix.linears.quantized_block_sparse import QuantizedBlockSparse
from seqmix.mixers import MIXERS
from seqmix.models.hf import SeqmixForCausalLM, create
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
        BlockSparse.of(layer, mask=mask, block=block),
        BlockSparse.of(layer, sparsity=sparsity, block=block),
    ):
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), wanted(x))
        assert sparse.to_dense().weight.equal(wanted.weight)


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
    sparse = BlockSparse.of(layer, sparsity=0.5)
    wanted = sparse.to_dense()(x).detach()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), wanted)
            assert relative_error(QuantizedBlockSparse.of(sparse)(x), wanted) < 0.02
    finally:
        torch.set_num_threads(before)


def test_eight_bits_lose_about_a_hundredth_and_no_more_than_rounding_does():
    sparse = BlockSparse.of(linear(512, 64), sparsity=0.8)
    quantized = QuantizedBlockSparse.of(sparse)
    x = torch.randn(20, 512)
    whole, factor = quantize_tokens(x)
    weight = sparse.to_dense().weight.detach()
    rounded = (weight / quantized.scales[:, None]).round() * quantized.scales[:, None]
    exact = (whole * factor).double() @ rounded.double().T + quantized.bias
    with torch.no_grad():
        assert relative_error(quantized(x), exact) < 1e-6
        assert relative_error(quantized(x), sparse(x)) < 0.02


def test_tokens_of_nothing_give_the_bias_and_strange_ones_nan():
    quantized = QuantizedBlockSparse.of(BlockSparse.of(linear(), sparsity=0.5))
    x = torch.randn(4, 48)
    x[0], x[1], x[2, 3] = 0.0, 1e-33, torch.inf
    y = quantized(x)
    assert y[0].equal(quantized.bias)
    assert y[1].equal(quantized.bias)
    assert y[2].isnan().all()
    assert y[3].isfinite().all()


@torch.no_grad()
def test_eight_bits_give_their_dense_layer_and_empty_ones_take_their_tensors():
    for sparse in (
        BlockSparse.of(linear(), sparsity=0.6),
        QuantizedBlockSparse.of(BlockSparse.of(linear(), sparsity=0.6)),
    ):
        again = type(sparse).empty(linear(), **sparse.options)
        again.load_state_dict(sparse.state_dict())
        x = torch.randn(3, 48)
        assert again(x).equal(sparse(x))
        assert relative_error(sparse(x), sparse.to_dense()(x)) < 0.02
        assert sparse.cost(2).flops < 0.5 * 4 * linear().weight.numel()


def test_gradients_reach_the_blocks_through_the_dense_form():
    sparse = BlockSparse.of(linear(), sparsity=0.5)
    x = torch.randn(3, 48, requires_grad=True)
    with record_forms() as forms:
        sparse(x).square().sum().backward()
    assert forms == {("sparse_matmul", "dense")}
    wanted = sparse.to_dense()
    same = x.detach().clone().requires_grad_()
    wanted(same).square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)
    mask = largest_blocks(linear().weight.detach(), 0.5)
    kept = wanted.weight.grad.unflatten(0, (-1, 4)).transpose(1, 2)[mask]
    torch.testing.assert_close(sparse.blocks.grad[..., 0], kept)


@pytest.mark.skipif(ISA is None, reason="there are no compiled kernels")
def test_inference_is_compiled():
    sparse = BlockSparse.of(linear(), sparsity=0.5)
    with record_forms() as forms, torch.no_grad():
        sparse(torch.randn(3, 48))
        QuantizedBlockSparse.of(sparse)(torch.randn(3, 48))
    assert {form for _, form in forms} == {"native"}


def test_kept_weights_make_up_for_lost_ones():
    layer = linear(48, 32)
    mixing = torch.logspace(-1, 0.5, 48)[:, None] * torch.randn(48, 48)
    x = (torch.randn(500, 48) @ mixing).double()
    moments = x.T @ x / len(x)
    wanted = layer.double()(x)
    with torch.no_grad():
        plain, aware = (made_sparse(layer, 0.7, given).to_dense() for given in (None, moments))
        assert relative_error(aware(x), wanted) < 0.8 * relative_error(plain(x), wanted)
        # At the least, the error is not correlated with any input that is kept.
        left = (wanted - aware(x)).T @ x / len(x)
        kept = aware.weight != 0
        assert left[kept].abs().max() < 0.01 * left[~kept].abs().max()
        assert kept.float().mean() == pytest.approx(0.3, abs=1e-2)


MIXERS_HERE = [name for name in MIXERS.names() if MIXERS.get(name).causal]


@pytest.mark.parametrize(
    "recipe", ["block_sparse:0.5(activations=false)", "block_sparse:0.5(quantized=true)"]
)
@pytest.mark.parametrize("mixer", MIXERS_HERE)
@torch.no_grad()
def test_every_mixer_can_be_made_sparse(mixer, recipe, tmp_path):
    model = create(f"[{mixer}/glu]", width=32, heads=4, vocabulary=50).eval()
    before = copy.deepcopy(model.state_dict())
    data = Calibration(windows=torch.randint(0, 50, (2, 32)))
    work = Work()
    made = parse_recipe(recipe)[0].fit(model, data, work)
    ids = data.windows[:, :9]
    logits = made(ids).logits
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    assert not logits.equal(model(ids).logits)
    assert work.notes["layers"] >= 3
    made.save_pretrained(tmp_path)
    assert SeqmixForCausalLM.from_pretrained(tmp_path).eval()(ids).logits.equal(logits)
    with pytest.raises(ConfigError, match="leaves no dense"):
        parse_recipe("block_sparse(layers=channel)")[0].fit(made, data, work)


def test_what_does_not_fit_is_refused():
    layer = linear()
    with pytest.raises(ConfigError, match="divide"):
        BlockSparse.of(layer, sparsity=0.5, block=(5, 1))
    with pytest.raises(ConfigError, match="either mask or sparsity"):
        BlockSparse.of(layer)
    with pytest.raises(ShapeError, match="`mask`"):
        BlockSparse.of(layer, mask=torch.ones(3, 3))
    with pytest.raises(RangeError, match="sparsity"):
        BlockSparse.of(layer, sparsity=1.5)
    with pytest.raises(ConfigError, match="multiple of 4"):
        QuantizedBlockSparse.of(BlockSparse.of(linear(8, 6), sparsity=0.5, block=(2, 1)))
    with pytest.raises(ShapeError, match="47 channels, wanted 48"):
        BlockSparse.of(layer, sparsity=0.5)(torch.zeros(2, 47))


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
