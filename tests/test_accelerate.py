"""Hugging Face models on our operators: the same logits, gradients and texts as transformers computes alone."""

import copy
import functools
import importlib
import inspect
import json
import sys
import types

import pytest
import torch
import transformers

import seqmix
from seqmix.cli import main
from seqmix.convert._places import FUNCTIONS, places
from seqmix.core.errors import ShapeError, UnknownName
from seqmix.core.numerics import assert_as_accurate, assert_equal_within, relative_error
from seqmix.kernels import ISA, missing
from seqmix.measure.hybrids import measure_hybrids

VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {**ATTENTION, "head_dim": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16}
MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
DELTA = {
    **HEADS,
    **HYBRID,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
KIMI = {
    **ATTENTION,
    **HYBRID,
    "num_key_value_heads": 4,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
INKLING = {
    **HEADS,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "rel_extent": 32,
    "d_rel": 4,
}
SIZES = {"n_groups": 2, "chunk_size": 16}

FAMILIES = {
    "mamba": ("Mamba", {"state_size": 8}),
    "falcon_mamba": ("FalconMamba", {"state_size": 8}),
    "jamba": (
        "Jamba",
        {
            **ATTENTION,
            **MAMBA,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "zamba": (
        "Zamba",
        {
            **ATTENTION,
            **MAMBA,
            "n_mamba_heads": 2,
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        },
    ),
    "mamba2": ("Mamba2", {**SIZES, "num_heads": 8, "head_dim": 8, "state_size": 16}),
    "bamba": ("Bamba", {**ATTENTION, **MAMBA2, "attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2",
        {
            **ATTENTION,
            "num_key_value_heads": 4,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 2,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "use_mem_rope": True,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **HEADS,
            **SIZES,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 16,
            "layers_block_type": ["linear_attention", "full_attention"],
            "time_step_limit": (0.01, 0.8),
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **ATTENTION,
            **MAMBA2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "falcon_h1": ("FalconH1", {**ATTENTION, **MAMBA2, "mamba_d_ssm": 64}),
    "qwen3_next": ("Qwen3Next", {**DELTA, **SHARED}),
    "qwen3_5": ("Qwen3_5", DELTA),
    "qwen3_5_moe": ("Qwen3_5Moe", {**DELTA, **SHARED}),
    "qwen4_exp": (
        "Qwen4Exp",
        {
            **DELTA,
            **SHARED,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 8,
            "hc_count": 2,
            "ple_layer_ids": [],
        },
    ),
    "olmo_hybrid": ("OlmoHybrid", DELTA),
    "kimi_linear": (
        "KimiLinear",
        {**KIMI, "q_lora_rank": None, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "bailing_hybrid": ("BailingHybrid", KIMI),
    "lfm2": ("Lfm2", {**ATTENTION, "layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": (
        "Lfm2Moe",
        {**ATTENTION, **EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "lfm3": ("Lfm3", {**ATTENTION, "layer_types": ["conv", "full_attention"]}),
    "inkling2": ("Inkling2", INKLING),
    "rwkv": ("Rwkv", {}),
    "minimax": (
        "MiniMax",
        {**HEADS, **HYBRID, "num_local_experts": 2, "block_size": 16},
    ),
}
ONLY_FLOAT32 = ("inkling2",)  # the model mixes dtypes in float64
every_family = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def build(name):
    prefix, options = FAMILIES[name]
    config_type = getattr(transformers, f"{prefix}TextConfig", None)
    config_type = config_type or getattr(transformers, f"{prefix}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config_type(**{**COMMON, **options}))
    model.set_experts_implementation("eager")
    with torch.no_grad():  # weights that matter: some families begin with zeros
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape)


def train(model, **inputs):
    model.train()
    model.zero_grad()
    output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss, "logits": output.logits, **gradients}


@every_family
@pytest.mark.filterwarnings("ignore")
def test_training_computes_the_same(name):
    model = build(name)
    inputs = {"input_ids": tokens(2, 37)}
    plain = {what: tensor.detach().clone() for what, tensor in train(model, **inputs).items()}
    with seqmix.accelerate(model) as handle:
        assert handle.replaced
        got = train(model, **inputs)
        assert got.keys() == plain.keys()
        if name in ONLY_FLOAT32:
            for what, tensor in got.items():
                assert_equal_within(tensor, plain[what], what=what)
            return
        exact = train(copy.deepcopy(model).double(), **inputs)
    # The delta rules of transformers compute in float32 whatever they are given: ours is the exact one, and the
    # two are the same function to the rounding of that.
    reference = train(copy.deepcopy(model).double(), **inputs)
    for what, tensor in got.items():
        assert relative_error(reference[what], exact[what]) < 1e-2, what
        assert_as_accurate(tensor, exact[what], plain[what], what=what)


@every_family
@pytest.mark.filterwarnings("ignore")
def test_generation_gives_the_same(name):
    model = build(name).eval()
    prompt = tokens(3, 9)
    mask = torch.ones_like(prompt)
    prompt[1, :4], mask[1, :4] = 0, 0  # padded on the left
    prompt[2, :1], mask[2, :1] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    beams = {} if name == "rwkv" else {"num_beams": 3}  # transformers cannot reorder RWKV's states

    def texts():
        return [
            model.generate(prompt[:1], attention_mask=mask[:1], **options),
            model.generate(prompt, attention_mask=mask, **options),
            model.generate(prompt[:1], attention_mask=mask[:1], **beams, **options),
        ]

    wanted = texts()
    with seqmix.accelerate(model):
        for got, text in zip(texts(), wanted, strict=True):
            assert got.equal(text)


@every_family
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_cache_is_continued_as_before(name):
    model = build(name).eval()
    ids = tokens(2, 29)
    cache = "state" if name == "rwkv" else "past_key_values"
    if name == "mamba" or name in ("falcon_mamba", "mamba2"):
        cache = "cache_params"

    def logits():
        parts, held = [], None
        for part in ids.split([12, 1, 1, 9, 1, 5], dim=1):
            output = model(part, use_cache=True, **({} if held is None else {cache: held}))
            held = output[cache]
            parts.append(output.logits)
        return torch.cat(parts, dim=1)

    wanted = logits()
    with seqmix.accelerate(model):
        assert_equal_within(logits(), wanted, what="logits")


@every_family
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("told_by", ["seq_idx", "cu_seq_lens_q"])
def test_packed_texts_are_kept_apart(name, told_by):
    if name == "rwkv":
        pytest.skip("transformers' RWKV takes no borders of texts")
    model = build(name).train()
    lengths = [5, 1, 17, 4]
    ids = tokens(1, sum(lengths))
    texts = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).unsqueeze(0)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    borders = {"seq_idx": texts.int()} if told_by == "seq_idx" else {"cu_seq_lens_q": bounds}
    if name not in ("mamba", "falcon_mamba", "mamba2"):  # those with attention count places
        borders["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)

    def gradients():
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    if (
        name == "granitemoehybrid"
    ):  # its attention is not told the places: give it the mask of the texts
        same = texts.unsqueeze(-1) == texts.unsqueeze(-2)
        borders["attention_mask"] = {
            "full_attention": same.tril().unsqueeze(1),
            "linear_attention": None,
        }
    weight = torch.randn(1, sum(lengths), VOCABULARY)
    with seqmix.accelerate(model):
        model.zero_grad()
        packed = model(ids, use_cache=False, **borders).logits
        (packed * weight).sum().backward()
        got = gradients()
        parts = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
        apart = torch.cat(parts, dim=1)
        (apart * weight).sum().backward()
        wanted = gradients()
    assert_equal_within(packed, apart, what="logits")
    for what, gradient in got.items():
        assert_equal_within(gradient, wanted[what], what=what, tolerance=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_text_model_without_a_head_computes_the_same():
    sizes = {"qk_rope_head_dim": 0, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 16}
    torch.manual_seed(0)
    model = transformers.Glm5NextTextModel(
        transformers.Glm5NextTextConfig(**{**COMMON, **KIMI, **sizes})
    )
    ids = tokens(2, 21)

    def run():
        model.zero_grad()
        hidden = model(ids, use_cache=False).last_hidden_state
        (hidden * torch.arange(hidden.shape[-1])).sum().backward()
        return hidden, {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    wanted, gradients = run()
    with seqmix.accelerate(model) as handle:
        assert "chunk_kimi_delta_attention" in {place.name for place in handle.replaced}
        got, ours = run()
    assert_equal_within(got, wanted, what="hidden states")
    for what, gradient in ours.items():
        assert_equal_within(gradient, gradients[what], what=what, tolerance=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_state_is_kept_as_transformers_lays_it_out():
    """Caches take over the strides of the first state, and transformers' own step takes views of it."""
    model = build("mamba2").eval()
    with torch.no_grad(), seqmix.accelerate(model):
        held = model(tokens(2, 5), use_cache=True).cache_params
    for layer in held.layers:
        assert layer.recurrent_states[0].is_contiguous()
        assert layer.conv_states[0].is_contiguous()


def modelling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_next", "kimi_linear", "lfm2"])
def test_checkpointed_training_computes_the_same(name, reentrant):
    """Mamba drops the borders of packed texts on the way to its mixers, which the second run must know too."""
    model = copy.deepcopy(build(name)).train()
    inputs = {"input_ids": tokens(1, 12), "seq_idx": torch.tensor([[0] * 5 + [1] * 7])}
    with seqmix.accelerate(model):
        wanted = train(model, **inputs)
        wanted = {what: tensor.detach().clone() for what, tensor in wanted.items()}
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        blocks = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
        runs = []
        for block in blocks:
            checkpoint = block._gradient_checkpointing_func
            block._gradient_checkpointing_func = functools.partial(_counted, runs, checkpoint)
        for what, tensor in train(model, **inputs).items():
            assert_equal_within(tensor, wanted[what], what=what)
        assert len(runs) == 2


def _counted(runs, checkpoint, *inputs):
    runs.append(checkpoint)
    return checkpoint(*inputs)


def test_what_was_replaced_comes_back():
    mamba = modelling("mamba")
    scan, forward = mamba.mamba_selective_scan, mamba.MambaMixer.forward
    first = seqmix.accelerate(build("mamba"))
    ours = mamba.mamba_selective_scan
    assert ours is not scan
    with seqmix.accelerate(build("mamba")) as second:  # changes nothing more
        assert mamba.mamba_selective_scan is ours
        assert second.replaced == first.replaced
        assert {place.operator for place in second.replaced} == {
            "short_convolution",
            "selective_scan",
        }
    assert mamba.mamba_selective_scan is ours
    first.undo()
    first.undo()
    assert mamba.mamba_selective_scan is scan
    assert mamba.MambaMixer.forward is forward
    assert "__call__" not in vars(mamba.MambaBlock)
    assert not first.replaced


def test_only_the_modules_of_the_model_change():
    jamba = modelling("jamba").mamba_selective_scan
    with seqmix.accelerate(build("mamba")):
        assert modelling("jamba").mamba_selective_scan is jamba


def test_models_imported_later_are_replaced_too():
    name = "transformers.models.falcon_mamba.modeling_falcon_mamba"
    module = modelling("falcon_mamba")
    reference = module.mamba_selective_scan
    with seqmix.accelerate() as handle:
        assert module.mamba_selective_scan is not reference
        del sys.modules[name]
        try:
            again = importlib.import_module(name)
            assert again is not module
            assert again.mamba_selective_scan.__module__ == name
            assert inspect.unwrap(again.mamba_selective_scan) is not again.mamba_selective_scan
            replaced = [place for place in handle.replaced if place.module == name]
            assert len(replaced) == 2 * len({place.name for place in replaced})
        finally:
            sys.modules[name] = module
            sys.modules["transformers.models.falcon_mamba"].modeling_falcon_mamba = module
    assert module.mamba_selective_scan is reference
    assert not any("_AfterImport" in type(finder).__name__ for finder in sys.meta_path)


def test_a_function_with_other_parameters_is_left_alone():
    module = types.ModuleType("transformers.models.other.modeling_other")
    module.causal_conv1d_fn = lambda x, weight: x
    assert list(places(module)) == []


def test_a_model_without_such_functions_is_said_to_have_none():
    with pytest.warns(UserWarning, match="calls none of the functions"):
        handle = seqmix.accelerate(torch.nn.Linear(2, 2))
    assert handle.replaced == []


def test_borders_must_fit_the_tokens():
    with (
        seqmix.accelerate(build("mamba")),
        pytest.raises(ShapeError, match=r"`seq_idx` has shape \[1, 3\]"),
    ):
        build("mamba")(tokens(1, 5), seq_idx=torch.zeros(1, 3), use_cache=False)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_tensors_elsewhere_go_where_transformers_sends_them(name):
    """What a GPU gets, as far as a machine without one can tell: tensors on the meta device stand for it."""
    calls = []
    reference = functools.partial(lambda *args, **kwargs: calls.append((args, kwargs)))
    reference.__name__ = name
    ours = FUNCTIONS[name].make(reference)
    arguments = [torch.empty(1, 2, 3, device="meta") for _ in FUNCTIONS[name].parameters]
    ours(*arguments, 64) if name == "mamba2_chunk_scan" else ours(*arguments)
    [(args, _)] = calls
    assert all(given is wanted for given, wanted in zip(args, arguments, strict=False))


def test_explain_says_what_runs_in_every_layer(tmp_path, capsys):
    build("qwen3_next").config.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["model"]["layers"]
    names = [row["function"] for row in layers if row["layer"] == "model.layers.0.linear_attn"]
    assert set(names) == {
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
    }
    assert [row["layer"] for row in layers if not row["operator"]] == ["model.layers.1.self_attn"]
    wanted = "chunked" if missing() else f"native {ISA}"
    assert {row["runs"] for row in layers if row["function"].startswith("torch_chunk")} == {wanted}
    assert all(row["why"] for row in layers)
    assert main(["explain", str(tmp_path)]) == 0
    assert "torch_chunk_gated_delta_rule" in capsys.readouterr().out


def test_explain_of_no_model_says_what_to_give(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["explain", str(tmp_path)]) != 0
    assert "Give a hub name, a folder" in capsys.readouterr().err


def test_hybrids_are_measured_in_turns():
    row = measure_hybrids("mamba", "decoding", length=2, repeats=1)
    assert row.ratio > 0
    assert row.plain.median > 0
    assert row.to_dict()["task"] == "decoding"
    with pytest.raises(UnknownName):
        measure_hybrids("mamba", "dreaming")
    with pytest.raises(UnknownName):
        measure_hybrids("no_such_family", "training")
