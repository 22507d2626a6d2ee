"""Which parameters are trained: only those change, what they cost, and what is saved."""

from __future__ import annotations

import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seqmix.core.errors import ConfigError
from seqmix.data.text import Corpus
from seqmix.data.tokenizer import byte_tokenizer, save_tokenizer
from seqmix.models.hf import create
from seqmix.models.pretrained import load
from seqmix.train import loop, train
from seqmix.train.parameters import (
    PREFIX,
    RANK,
    SELECTIONS,
    blocks_of,
    merged,
    select_parameters,
    training_cost,
)

TEXT = Corpus("letters", ("".join(chr(97 + (i * i * 7 + i // 3) % 26) for i in range(2000)),))
SETTINGS = {"steps": 4, "length": 16, "batch": 2, "learning_rate": 1e-2, "progress": False}
IDS = torch.arange(24).view(2, 12)
WIDTH, LAYERS = 32, 2


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": WIDTH, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()


def own():
    torch.manual_seed(0)
    return create("gated_linear_attention, attention", width=WIDTH, heads=2).eval()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = save_tokenizer(byte_tokenizer(), tmp_path_factory.mktemp("bytes"))
    return AutoTokenizer.from_pretrained(folder)


def changed(before, model):
    after = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("make", [llama, own])
@pytest.mark.parametrize(
    ("parameters", "where"),
    [("head", ("embed", "head")), ("last", ("layers.1.", "blocks.1."))],
)
def test_only_the_chosen_parameters_change(make, parameters, where, words):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = train(model, TEXT, parameters=parameters, tokenizer=words, **SETTINGS)
    assert trained.model is model
    found = changed(before, model)
    assert found == {name for name in before if any(part in name for part in where)}


@pytest.mark.parametrize("make", [llama, own])
def test_low_rank_changes_linear_layers_of_blocks_and_leaves_no_adapter(make, words):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = train(model, TEXT, parameters="lora", tokenizer=words, **SETTINGS)
    assert type(trained.model) is type(model)
    after = trained.model.state_dict()
    assert set(after) == set(before)
    linear = {name for name in changed(before, trained.model) if before[name].ndim == 2}
    assert linear
    assert linear == changed(before, trained.model)
    for name in linear:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= RANK
    assert not any("embed" in name for name in linear)


def test_a_merged_model_gives_what_the_adapter_gave():
    model = select_parameters(llama(), "lora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        expected = model(IDS).logits
        assert not torch.allclose(expected, llama()(IDS).logits, atol=1e-3)
        torch.testing.assert_close(merged(model)(IDS).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_saved_run_holds_merged_weights(tmp_path, words):
    trained = train(own(), TEXT, parameters="lora", tokenizer=words, out=tmp_path, **SETTINGS)
    again, _ = load(tmp_path)
    expected, got = trained.model.state_dict(), again.state_dict()
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_low_rank_run_resumes_to_the_same_end(tmp_path, words, monkeypatch):
    options = {"parameters": "lora", "tokenizer": words, **SETTINGS}
    whole = train(own(), TEXT, **options)
    step = loop._Trainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.record.steps == 2 and not self.record.loss_sum:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(own(), TEXT, out=tmp_path, **options)
    resumed = train(own(), TEXT, out=tmp_path, **options)
    assert [entry["loss"] for entry in resumed.history] == [e["loss"] for e in whole.history]
    assert resumed.evaluation == whole.evaluation


def test_a_prefix_is_all_that_changes_and_it_helps(words):
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = SETTINGS | {"steps": 12, "learning_rate": 0.1}
    trained = train(model, TEXT, parameters="prefix", tokenizer=words, **options)
    assert not changed(before, llama())
    base = trained.model.get_base_model().state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    with pytest.raises(ConfigError, match="save_pretrained"):
        merged(trained.model)


def test_a_prefix_starts_as_ends_of_text():
    model = llama()
    model.config.eos_token_id = 256
    before = torch.cat([torch.full((2, PREFIX), 256), IDS], dim=1)
    expected = model(before).logits[:, PREFIX:]
    adapted = select_parameters(model, "prefix").eval()
    torch.testing.assert_close(adapted(IDS).logits, expected, atol=1e-5, rtol=1e-4)


def test_cost_counts_the_products_that_run():
    """A linear layer costs 2 FLOPs per weight and token forward, 2 for its input's gradient, 2 for its own."""
    model = llama()
    head = 258 * WIDTH
    block = sum(p.numel() for p in blocks_of(model)[-1].parameters() if p.ndim == 2)
    every = head + LAYERS * block
    costs = {name: training_cost(select_parameters(llama(), name), IDS) for name in SELECTIONS}
    assert costs["all"].flops_per_token == 6 * every
    assert costs["head"].flops_per_token == 4 * every + 2 * head
    # the lowest trained layers need no gradient of their input
    inputs = sum(
        p.numel()
        for name, p in blocks_of(model)[-1].named_parameters()
        if name.startswith(("self_attn.q", "self_attn.k", "self_attn.v"))
    )
    assert 0 <= 2 * every + 2 * head + 4 * block - costs["last"].flops_per_token <= 2 * inputs
    assert max(costs, key=lambda name: costs[name].flops_per_token) == "all"
    assert costs["head"].parameters == head
    assert costs["prefix"].parameters == PREFIX * LAYERS * 2 * (WIDTH // 4 * 2)
    assert costs["all"].optimizer_bytes == 2 * 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("make", [llama, own])
def test_a_cost_leaves_the_model_as_it_was(make):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training_cost(model, IDS)
    assert not model.training
    assert not changed(before, model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_chosen_is_refused(words, tmp_path):
    with pytest.raises(ConfigError, match="all, head, last, lora, prefix"):
        select_parameters(llama(), "heads")
    with pytest.raises(ConfigError, match="seqmix model"):
        select_parameters(own(), "prefix")
    with pytest.raises(ConfigError, match="without `out`"):
        train(llama(), TEXT, parameters="prefix", tokenizer=words, out=tmp_path, **SETTINGS)


def test_a_frozen_model_stays_frozen_by_default(words):
    model = llama()
    model.get_input_embeddings().requires_grad_(False)
    before = model.get_input_embeddings().weight.clone()
    train(model, TEXT, tokenizer=words, **SETTINGS)
    assert torch.equal(model.get_input_embeddings().weight, before)
