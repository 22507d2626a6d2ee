"""Every family of transformers' models here and back: equal logits, padded, cached and generated."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from seqmix.convert.families import FAMILIES
from seqmix.convert.hub import to_seqmix, to_transformers
from seqmix.core.errors import CheckpointError, ConfigError
from seqmix.models.hf import create
from seqmix.models.layout import Entry, Part
from seqmix.models.pretrained import ASSETS, load, load_language_model
from seqmix.models.rebuild import rebuild

LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
OPT = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
CONFIGS = {
    "llama": ("LlamaConfig", LLAMA),
    "llama3": ("LlamaConfig", {**LLAMA, "head_dim": 10, "rope_parameters": LLAMA3}),
    "llama_biases": (
        "LlamaConfig",
        {**LLAMA, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", {**LLAMA, **WINDOW, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 14}),
    "gemma": ("GemmaConfig", {**LLAMA, "head_dim": 10}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **LLAMA,
            "head_dim": 10,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": ("GPT2Config", {**SMALL, "n_inner": 52, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
    "gpt_neox_in_turn": ("GPTNeoXConfig", {**SMALL, "use_parallel_residual": False}),
    "opt": ("OPTConfig", {**OPT, "ffn_dim": 52}),
    "mamba": (
        "MambaConfig",
        {**OPT, "state_size": 5, "time_step_rank": 3, "expand": 2, "conv_kernel": 3},
    ),
    "mamba2": (
        "Mamba2Config",
        {
            **{name: value for name, value in OPT.items() if name != "num_attention_heads"},
            "num_heads": 6,
            "head_dim": 16,
            "n_groups": 2,
            "state_size": 5,
        },
    ),
}
CONFIGS["rwkv"] = ("RwkvConfig", {**SMALL, "rescale_every": 0})
ENCODERS = {
    "bert": ("BertModel", {**SMALL, "hidden_act": "gelu_new"}),
    "bert_masked": ("BertForMaskedLM", SMALL),
}
UNCACHED = (
    "rwkv",
)  # its generate drops the state in transformers 5.23: other texts than by full forwards
FOLDED = ("gemma", "gemma3", "opt")  # 1 + w is rounded; two rows of positions are dropped


def original(name, **fields):
    """A random model with norms and biases that are not those of the start."""
    kind, values = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**values, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    return model


def tokens(length=23):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 101, (2, length), generator=generator)


def assert_equal(found, wanted):
    assert torch.isfinite(wanted).all()
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5, f"relative difference {error:.1e}"


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_equal_there_and_back(name, tmp_path):
    model, ids = original(name), tokens()
    wanted = model(ids).logits
    made = to_seqmix(model)
    assert_equal(made(ids).logits, wanted)
    made.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    back = to_transformers(loaded)
    assert type(back) is type(model)
    assert_equal(back(ids).logits, wanted)
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    if name not in FOLDED:
        assert [k for k, v in before.items() if not torch.equal(v, after[k])] == []
    ids_of_tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    for each in (made, back):
        assert [getattr(each.config, k) for k in ids_of_tokens] == [1, 2, 0]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padded_batches_and_caches_give_the_same(name):
    model, ids = original(name), tokens()
    made = to_seqmix(model)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    alone = model(ids[:1, 4:]).logits
    assert_equal(made(ids, attention_mask=mask).logits[:1, 4:], alone)
    first = made(ids[:, :9])
    rest = made(ids[:, 9:], past_key_values=first.past_key_values).logits
    assert_equal(rest, model(ids).logits[:, 9:])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    start = ids[:, :7]
    given = torch.ones_like(start)
    assert torch.equal(
        made.generate(start, attention_mask=given, **options),
        model.generate(start, attention_mask=given, use_cache=name not in UNCACHED, **options),
    )


def encoder(name, **fields):
    """A random encoder with norms and biases that are not those of the start."""
    kind, values = ENCODERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**{**values, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
    return model


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_encoders_give_the_same_there_and_back(name, tmp_path):
    model, ids = encoder(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    wanted = model(ids, attention_mask=mask)[0]
    made = to_seqmix(model)
    assert_equal(made(ids, attention_mask=mask)[0][mask == 1], wanted[mask == 1])
    made.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert type(loaded) is type(made)
    back = to_transformers(loaded)
    assert type(back) is type(model)
    assert_equal(back(ids, attention_mask=mask)[0][mask == 1], wanted[mask == 1])
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() - after.keys() == {k for k in before if k.startswith("pooler.")}
    folded = {k for k in before if "position" in k or "token_type" in k}
    assert [k for k in after.keys() - folded if not torch.equal(after[k], before[k])] == []
    with pytest.raises(ConfigError, match="one type of token"):
        made(ids, token_type_ids=torch.ones_like(ids))


def test_an_encoder_predicts_no_next_token(tmp_path):
    to_seqmix(encoder("bert")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="SeqmixEncoder, which is not a causal language"):
        load_language_model(tmp_path)


@torch.no_grad()
def test_rwkv_that_was_halved_for_evaluation_is_read_as_it_was_stored():
    model, ids = original("rwkv", rescale_every=1), tokens()
    wanted = model.train()(ids).logits
    stored = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()(ids)
    assert not torch.equal(
        model.state_dict()["rwkv.blocks.2.attention.output.weight"],
        stored["rwkv.blocks.2.attention.output.weight"],
    )
    made = to_seqmix(model)
    assert_equal(made(ids).logits, wanted)
    back = to_transformers(made).state_dict()
    assert all(torch.equal(back[k], v) for k, v in stored.items())


@torch.no_grad()
def test_real_weights_of_an_encoder():
    if ASSETS["minilm"].paths() is None:
        pytest.skip(f"MiniLM is not installed: {ASSETS['minilm'].install}")
    model, tokenizer = load("minilm")
    made = to_seqmix(model)
    given = tokenizer(
        ["A short text.", "Another text, of more words."], padding=True, return_tensors="pt"
    )
    found, wanted = made(**given)[0], model(**given)[0]
    assert_equal(found[given.attention_mask == 1], wanted[given.attention_mask == 1])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("rwkv", "layer_norm_epsilon", 1e-6),
        ("rwkv", "attention_hidden_size", 40),
        ("bert", "is_decoder", True),
        ("bert_masked", "hidden_act", "relu"),
        ("llama", "mlp_bias", True),
        ("llama", "hidden_act", "tanh"),
        ("llama", "rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ("qwen3", "rms_norm_eps", 1e-5),
        ("gemma3", "final_logit_softcapping", 30.0),
        ("opt", "word_embed_proj_dim", 24),
        ("opt", "do_layer_norm_before", False),
        ("mamba", "use_conv_bias", False),
    ],
)
def test_what_has_no_counterpart_is_refused_by_its_field(name, field, value):
    with pytest.raises(ConfigError, match=field):
        to_seqmix((encoder if name in ENCODERS else original)(name, **{field: value}))


def test_other_families_are_refused():
    config = transformers.Gemma2Config(**LLAMA, head_dim=10)
    with pytest.raises(ConfigError, match=r"model_type='gemma2'.*wanted one of"):
        to_seqmix(transformers.AutoModelForCausalLM.from_config(config))


def test_the_original_keeps_its_weights():
    model = original("llama")
    made = to_seqmix(model)
    before = model.model.norm.weight.clone()
    with torch.no_grad():
        made.model.backbone.norm.weight.zero_()
    assert torch.equal(model.model.norm.weight, before)
    assert to_seqmix(made) is made


def test_a_changed_model_says_why_it_stays_here():
    made = to_seqmix(original("llama"))
    spec = made.config.to_spec()
    entries = spec.entries()
    entries[1] = Entry(Part("none"), entries[1].channel)
    tensors = {k: v for k, v in made.state_dict().items() if "blocks.1.mixer" not in k}
    with pytest.raises(ConfigError, match=r"no longer a llama: block 1 is none"):
        to_transformers(rebuild(made, spec.with_entries(entries), tensors))
    made.config.spec = dataclasses.replace(spec, norm_eps=1e-3).to_dict()
    with pytest.raises(ConfigError, match=r"norm_eps is 0.001"):
        to_transformers(made)
    with pytest.raises(ConfigError, match="no source"):
        to_transformers(create("attention", width=16, heads=2))


def test_every_family_is_tested():
    tested = {getattr(transformers, kind).model_type for kind, _ in CONFIGS.values()} | {"bert"}
    assert tested == {kind for name in FAMILIES for kind in FAMILIES.get(name).model_types}
