"""Models that stay in transformers, served with their own caches: the same answers as of whole forwards."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from seqmix.core.state import load_state, save_state
from seqmix.generate import Sampling
from seqmix.serve.engine import Engine, Limits
from seqmix.serve.request import Request
from seqmix.serve.run import reader_of
from seqmix.serve.transformers_reader import TransformersReader

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "initializer_range": 0.3,  # so that what was read matters
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
FAMILIES = {
    "lfm2": lambda: Lfm2ForCausalLM(
        Lfm2Config(**SIZES, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    ),
    "qwen3_next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES,
            **LINEAR,
            **EXPERTS,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            head_dim=16,
        )
    ),
    "jamba": lambda: JambaForCausalLM(
        JambaConfig(
            **SIZES,
            num_hidden_layers=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=1,
            num_experts_per_tok=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
        )
    ),
    "window": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            num_hidden_layers=2,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=6,
            head_dim=16,
        )
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def reader(request):
    torch.manual_seed(0)
    made = TransformersReader(FAMILIES[request.param]().eval())
    assert made.goes_on == (request.param != "jamba")
    yield made
    made.acceleration.undo()


def text(length, seed):
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(64, (length,), generator=numbers).tolist()


def ask(engine, prompts, new=6):
    answers = [[] for _ in prompts]
    asked = [
        Request(prompt, lambda event, to=to: to.append(event.token), new, Sampling(temperature=0))
        for prompt, to in zip(prompts, answers, strict=True)
    ]
    for request in asked:
        engine.submit(request)
    while engine.step():
        pass
    return answers, asked


def test_answers_are_those_of_whole_forwards(reader):
    prompts = [text(1, 0), text(5, 1), text(29, 2), text(29, 2)[:12]]
    answers, _ = ask(Engine(reader, Limits(chunk=8, piece=4)), prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = reader.model(torch.tensor([[*prompt, *answer]])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_a_text_read_before_is_not_read_again(reader, tmp_path):
    engine = Engine(reader, Limits(chunk=8))
    (first,), _ = ask(engine, [text(20, 5)])
    turn = [*text(20, 5), *first, *text(3, 6)]
    (again,), (follow,) = ask(engine, [turn])
    assert follow.reused == 25
    (fresh,), _ = ask(Engine(reader, Limits(cache=0)), [turn])
    assert again == fresh
    state = engine.cache.find(turn[:-1]).state
    kept = load_state(save_state(state, tmp_path / "state"))
    assert torch.equal(reader.read([[turn[-1]]], kept)[0], reader.read([[turn[-1]]], state)[0])


def test_what_to_seqmix_does_not_take_is_read_with_its_own_cache():
    with pytest.warns(UserWarning, match="Lfm2ForCausalLM stays a model of transformers"):
        made = reader_of(FAMILIES["lfm2"]())
    assert isinstance(made, TransformersReader)
    made.acceleration.undo()
