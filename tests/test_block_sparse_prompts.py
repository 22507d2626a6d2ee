"""A pretrained model with block-sparse prompts: the same model where everything is kept, and afterwards."""

import pytest
import torch
from torch import nn

from seqmix.convert.block_sparse import block_sparse_prompts
from seqmix.core.errors import ConfigError

transformers = pytest.importorskip("transformers")


def small():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_all_of_the_attention_gives_the_same_model():
    model, ids = small(), torch.randint(50, (2, 75))
    wanted = model(ids).logits
    with block_sparse_prompts(model, share=1.0, block=16, stride=4) as sparsity:
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    assert sparsity.density == 1.0
    assert (
        sparsity.visible == 2 * 2 * 4 * 15
    )  # layers, texts, heads, blocks on and below the diagonal


@torch.no_grad()
def test_less_of_it_computes_fewer_blocks_and_ends_with_the_block():
    model, ids = small(), torch.randint(50, (1, 160))
    wanted = model(ids).logits
    seen = []
    shares = torch.tensor([[0.1] * 4, [1.0] * 4])
    with block_sparse_prompts(
        model,
        share=shares,
        block=16,
        stride=4,
        watch=lambda layer, q, k, blocks: seen.append((layer, int(blocks.sum()))),
    ) as sparsity:
        changed = model(ids).logits
    assert sparsity.density < 1
    assert seen[0][1] < seen[1][1] == 4 * 55
    assert not torch.allclose(changed, wanted)
    assert torch.equal(model(ids).logits, wanted)


@torch.no_grad()
def test_generation_and_padded_batches_are_computed_in_full():
    model, ids = small(), torch.randint(50, (2, 75))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    wanted = model(ids, attention_mask=mask).logits
    with block_sparse_prompts(model, share=0.1, block=16, stride=4) as sparsity:
        got = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[1], wanted[1])
        assert sparsity.visible == 0
        model.generate(ids[1:], max_new_tokens=4, do_sample=False)
    assert sparsity.visible == 2 * 4 * 15  # of the prompt alone


def test_what_cannot_be_made_sparse_is_refused():
    with (
        pytest.raises(ConfigError, match="wanted a model of transformers"),
        block_sparse_prompts(nn.Linear(2, 2)),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"with 2 layers"),
        block_sparse_prompts(small(), share=torch.ones(3, 4)),
    ):
        pass
