"""Training: exact resumption, budgets, groups, schedules, tasks, evaluation."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import math
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from seqmix.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericalError,
    RangeError,
)
from seqmix.core.files import OutputError
from seqmix.data.packing import pack
from seqmix.data.text import Corpus
from seqmix.data.tokenizer import encode
from seqmix.models.backbone import ModelSpec
from seqmix.models.hf import SeqmixForCausalLM, create
from seqmix.tasks import Batch
from seqmix.testing.models import build, draw
from seqmix.train import evaluate, evaluate_task, language, loop, train, train_task
from seqmix.train.evaluation import backend_of
from seqmix.train.folder import RunFolder
from seqmix.train.language import prepare
from seqmix.train.plan import parameter_groups
from seqmix.train.schedule import factor

SPEC = ModelSpec(layout="gated_linear_attention, attention", width=16, heads=2, channel="mlp")
TEXT = "".join(chr(97 + (i * i * 7 + i // 3) % 26) for i in range(3000))
CORPUS = Corpus("letters", (TEXT[:1100], TEXT[1100:1150], TEXT[1150:2500], TEXT[2500:]))
SETTINGS = {"steps": 12, "length": 16, "batch": 2, "accumulate": 2, "progress": False}


def curve(trained):
    return [(entry["step"], entry["loss"], entry["learning_rate"]) for entry in trained.history]


@pytest.fixture(scope="module")
def uninterrupted():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train(SPEC, CORPUS, **SETTINGS)
    torch.set_num_threads(threads)


class TestResuming:
    def test_after_kill(self, tmp_path, uninterrupted):
        """Killed while the checkpoint of step 8 is being written: goes on from step 4, to the same end."""
        code = f"""
import os, torch
from seqmix.train import train
from seqmix.train.folder import RunFolder
from seqmix.models.backbone import ModelSpec
from seqmix.data.packing import pack
from seqmix.data.text import Corpus
torch.set_num_threads(1)
keep = RunFolder.keep
def keep_or_die(self, written, step):
    if step == 8:
        (written / "optimizer.pt").write_bytes(b"half")
        os.kill(os.getpid(), 9)
    return keep(self, written, step)
RunFolder.keep = keep_or_die
train({SPEC!r}, {CORPUS!r}, out={str(tmp_path)!r}, save_every=4, **{SETTINGS!r})
"""
        ended = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], timeout=180, check=False
        )
        assert ended.returncode == -signal.SIGKILL
        checkpoints = tmp_path / "checkpoints"
        assert [path.name for path in checkpoints.glob("step-*")] == ["step-4"]
        resumed = train(SPEC, CORPUS, out=tmp_path, save_every=4, **SETTINGS)
        assert curve(resumed) == curve(uninterrupted)
        assert resumed.evaluation == uninterrupted.evaluation
        assert resumed.tokens == uninterrupted.tokens == 12 * 2 * 2 * 16
        assert not checkpoints.exists()

    def test_after_ctrl_c(self, tmp_path, uninterrupted, monkeypatch):
        step = loop._Trainer.training_step

        def interrupted(self, *args, **kwargs):
            if self.record.steps == 5 and not self.record.loss_sum:
                signal.raise_signal(signal.SIGINT)
            return step(self, *args, **kwargs)

        handler = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            patch.setattr(loop._Trainer, "training_step", interrupted)
            with pytest.raises(KeyboardInterrupt, match=r"after step 6.*step-6.*same call"):
                train(SPEC, CORPUS, out=tmp_path, **SETTINGS)
        assert signal.getsignal(signal.SIGINT) is handler
        assert curve(train(SPEC, CORPUS, out=tmp_path, **SETTINGS)) == curve(uninterrupted)

    def test_finished_run_is_not_repeated(self, tmp_path, monkeypatch):
        first = train(SPEC, CORPUS, out=tmp_path, **SETTINGS)
        monkeypatch.setattr(language, "run", pytest.fail)
        again = train(SPEC, CORPUS, out=tmp_path, **SETTINGS)
        assert again.record() == json.loads(json.dumps(first.record()))
        ids = draw(1, 6)
        assert torch.equal(again.model(ids).logits, first.model(ids).logits)
        assert again.tokenizer("é")["input_ids"] == list("é".encode())

    def test_other_arguments_are_refused(self, tmp_path):
        train(SPEC, CORPUS, out=tmp_path, **SETTINGS)
        with pytest.raises(CheckpointError, match=r"learning_rate=0\.003.*learning_rate=0\.01"):
            train(SPEC, CORPUS, out=tmp_path, learning_rate=0.01, **SETTINGS)
        with pytest.raises(OutputError, match="earlier run"):
            train(SPEC, CORPUS, out=tmp_path, resume=False, **SETTINGS)

    def test_folder_of_the_user_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("precious")
        with pytest.raises(OutputError, match="Choose another folder"):
            train(SPEC, CORPUS, out=tmp_path, **SETTINGS)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_full_disk(self, tmp_path, monkeypatch, uninterrupted):
        save = torch.save

        def full(contents, path, *args, **kwargs):
            if "checkpoint-8" in str(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(contents, path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", full)
            with pytest.raises(OutputError, match=r"No space left.*untouched.*same command"):
                train(SPEC, CORPUS, out=tmp_path, save_every=4, **SETTINGS)
        resumed = train(SPEC, CORPUS, out=tmp_path, save_every=4, **SETTINGS)
        assert curve(resumed) == curve(uninterrupted)

    def test_full_disk_at_the_end(self, tmp_path, monkeypatch, uninterrupted):
        def full(*args, **kwargs):
            raise Exception("No space left on device (os error 28)")  # as tokenizers does

        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
            with pytest.raises(OutputError, match=r"No space left.*untouched.*same command"):
                train(SPEC, CORPUS, out=tmp_path, save_every=4, **SETTINGS)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-8"]
        resumed = train(SPEC, CORPUS, out=tmp_path, save_every=4, **SETTINGS)
        assert curve(resumed) == curve(uninterrupted)

    def test_damaged_checkpoint(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "finish", lambda *_: pytest.fail("finished"))
            with pytest.raises(pytest.fail.Exception):
                train(SPEC, CORPUS, out=tmp_path, save_every=5, **SETTINGS)
        weights = tmp_path / "checkpoints" / "step-10" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-40])
        with pytest.raises(CheckpointError, match=r"step-10.*Remove it"):
            train(SPEC, CORPUS, out=tmp_path, save_every=5, **SETTINGS)

    def test_damaged_optimizer_is_named_in_one_line(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "finish", lambda *_: pytest.fail("finished"))
            with pytest.raises(pytest.fail.Exception):
                train(SPEC, CORPUS, out=tmp_path, save_every=5, **SETTINGS)
        (tmp_path / "checkpoints" / "step-10" / "optimizer.pt").write_bytes(b"garbage")
        with pytest.raises(CheckpointError, match=r"step-10.*Remove it") as caught:
            train(SPEC, CORPUS, out=tmp_path, save_every=5, **SETTINGS)
        assert "\n" not in str(caught.value)


class TestBudgets:
    @pytest.mark.parametrize("budget", [{}, {"steps": 2, "tokens": 5}, {"steps": 0}, {"tokens": 0}])
    def test_bad(self, budget):
        with pytest.raises(ConfigError):
            train(SPEC, CORPUS, progress=False, **budget)

    def test_tokens(self):
        trained = train(SPEC, CORPUS, tokens=100, length=16, batch=2, progress=False)
        assert (trained.steps, trained.tokens) == (4, 128)  # rounded up to whole steps

    def test_seconds(self, tmp_path, monkeypatch):
        """A clock that ticks once per look: each step after the first takes one second."""
        ticks = itertools.count()
        monkeypatch.setattr(loop.time, "perf_counter", lambda: next(ticks))
        settings = {"seconds": 9, "length": 16, "batch": 2, "progress": False, "save_every": 4}
        whole = train(SPEC, CORPUS, **settings)
        assert (whole.steps, whole.seconds, whole.tokens_per_second) == (10, 9, 32)
        rates = [entry["learning_rate"] for entry in whole.history]
        assert max(rates) <= 3e-3
        assert rates[-1] < rates[3]

        monkeypatch.setattr(loop._Pace, "interrupted", False, raising=False)
        with monkeypatch.context() as patch:
            patch.setattr(loop._Trainer, "training_step", _raise_at(6))
            with pytest.raises(ZeroDivisionError):
                train(SPEC, CORPUS, out=tmp_path, **settings)
        resumed = train(SPEC, CORPUS, out=tmp_path, **settings)
        # Three seconds were used up to step 4; the first step of the new process is not counted.
        assert (resumed.steps, resumed.seconds) == (4 + 1 + 6, 9)


def _raise_at(step):
    before = loop._Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.record.steps == step:
            raise ZeroDivisionError
        return before(self, *args, **kwargs)

    return training_step


def test_accumulated_batches_equal_one_large_batch():
    settings = SETTINGS | {"steps": 4}
    parts = train(SPEC, CORPUS, **settings)
    whole = train(SPEC, CORPUS, **settings | {"batch": 4, "accumulate": 1})
    for one, other in zip(parts.history, whole.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_same_seed_same_model_other_seed_other_model():
    models = [train(SPEC, CORPUS, seed=seed, **SETTINGS | {"steps": 2}).model for seed in (0, 0, 1)]
    logits = [model(draw(1, 5)).logits for model in models]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_bfloat16_trains():
    settings = SETTINGS | {"steps": 8}
    half = train(SPEC, CORPUS, precision="bfloat16", **settings)
    full = train(SPEC, CORPUS, **settings)
    assert half.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=0.02)
    assert half.history[-1]["loss"] != full.history[-1]["loss"]
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("layout", ["gated_linear_attention", "attention", "mamba2"])
def test_loss_that_is_not_finite_names_the_step(layout):
    with pytest.raises(NumericalError, match=r"step \d+ is .*learning rate \(1e\+30\)") as caught:
        train(layout, CORPUS, learning_rate=1e30, **SETTINGS)
    assert caught.value.step > 1


def test_history_and_forms():
    trained = train(SPEC, CORPUS, evaluate_every=6, **SETTINGS)
    assert [entry["step"] for entry in trained.history] == list(range(1, 13))
    assert [entry["step"] for entry in trained.history if "validation_loss" in entry] == [6, 12]
    assert trained.history[-1]["validation_loss"] == trained.evaluation["loss"]
    assert {operator for operator, _ in trained.forms} == {"attention", "linear_attention"}


@torch.no_grad()
def test_documents_do_not_see_each_other():
    model, words = prepare(SPEC, "bytes", CORPUS, seed=0)
    short = Corpus("short", ("ab" * 5, "cd" * 5))
    seen = evaluate(model, short, length=64, tokenizer=words, progress=False)
    losses = []
    for document in short.documents:
        ids = torch.tensor([[*document.encode(), words.eos_token_id]])
        logits = model(ids).logits[0, :-1]
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    # Training learns where documents end; evaluation does not score it.
    assert seen["loss"] == pytest.approx(
        torch.cat([x[:-1] for x in losses]).mean().item(), rel=1e-5
    )
    packed = pack([list(d.encode()) for d in short.documents], 22, eos=256)
    draw_batch = language.shuffled(packed, 1, seed=0, keep_segments=True)
    assert model(**draw_batch(0)).loss.item() == pytest.approx(
        torch.cat(losses).mean().item(), rel=1e-5
    )


def test_going_on_from_a_folder_keeps_its_tokenizer(tmp_path):
    first = train(SPEC, CORPUS, tokenizer="bpe:270", out=tmp_path, **SETTINGS)
    second = train(tmp_path, CORPUS, **SETTINGS)
    assert len(second.tokenizer) == first.model.config.vocab_size == 270
    assert second.history[0]["loss"] < first.history[0]["loss"]


# peft asks models for a name that this transformers has deprecated
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_train(tmp_path):
    import peft

    model, words = prepare(SPEC, "bytes", CORPUS, seed=0)
    before = model.model.backbone.blocks[0].mixer.value.weight.clone()
    settings = peft.LoraConfig(r=2, target_modules=["query"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    trained = train(adapted, CORPUS, tokenizer=words, out=tmp_path, learning_rate=0.03, **SETTINGS)
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]
    assert torch.equal(model.model.backbone.blocks[0].mixer.value.weight, before)
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("copied", [False, True])
def test_vectors_embeddings_and_listed_parameters_do_not_decay(copied):
    model = create("mamba", width=32, vocabulary=40, tied=False)
    model = copy.deepcopy(model) if copied else model
    decayed, others = (group["params"] for group in parameter_groups(model, 0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in others}
    assert {"model.embedding.weight", "model.backbone.blocks.0.mixer.A_log"} <= kept
    assert all(p.ndim > 1 for p in decayed)
    assert "model.head.weight" in {names[id(p)] for p in decayed}
    assert len(decayed) + len(others) == len(names)


@pytest.mark.parametrize("name", ["cosine", "warmup_stable_decay"])
def test_schedules(name):
    values = [factor(name, i / 100, warmup=0.1) for i in range(101)]
    assert values[0] == 0
    assert values[10] == 1
    assert values[100] == pytest.approx(0)
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert (values[79] == 1) == (name == "warmup_stable_decay")


def test_the_trainer_of_transformers(tmp_path):
    model = build("gated_linear_attention, attention").train()
    rows = [{"input_ids": ids, "labels": ids} for ids in draw(16, 8)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=8,
        save_steps=8,
        learning_rate=0.01,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    first = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < first
    loaded = SeqmixForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    ids = draw(1, 5)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


class Echo:
    """The right output is the input itself: what a model that shifts its labels cannot learn."""

    class config:
        length = 8

        @staticmethod
        def to_dict():
            return {}

    vocabulary = 10

    def batch(self, index, size, *, split="train", length=None):
        generator = torch.Generator().manual_seed(index + 1000 * (split == "test"))
        inputs = torch.randint(0, 10, (size, length or 8), generator=generator)
        return Batch(inputs, inputs.clone())

    def accuracy(self, predictions, labels):
        return (predictions == labels).double().mean().item()

    def chance(self):
        return 0.1


class TestTasks:
    def test_labels_are_aligned(self):
        trained = train_task(SPEC, Echo(), steps=60, batch=16, learning_rate=0.02)
        assert trained.evaluation == {"accuracy": 1.0, "chance": 0.1}
        assert trained.model.config.vocab_size == 10
        assert evaluate_task(trained.model, Echo(), length=20, batches=1) == 1.0

    def test_stops_early(self):
        trained = train_task(SPEC, Echo(), steps=200, batch=16, learning_rate=0.02, stop_at=0.9)
        assert trained.steps < 200
        assert trained.history[-1]["accuracy"] >= 0.9

    def test_resumes(self, tmp_path, monkeypatch):
        settings = {"steps": 10, "batch": 4, "save_every": 4}
        whole = train_task(SPEC, Echo(), **settings)
        with monkeypatch.context() as patch:
            patch.setattr(loop._Trainer, "training_step", _raise_at(6))
            with pytest.raises(ZeroDivisionError):
                train_task(SPEC, Echo(), out=tmp_path, **settings)
        assert curve(train_task(SPEC, Echo(), out=tmp_path, **settings)) == curve(whole)
        assert curve(train_task(SPEC, Echo(), out=tmp_path, **settings)) == curve(whole)

    def test_vocabulary_that_is_too_small(self):
        with pytest.raises(ConfigError, match="10 ids"):
            train_task(create(SPEC, vocabulary=9), Echo(), steps=1)


@pytest.fixture(scope="module")
def model():
    return prepare(SPEC, "bytes", CORPUS, seed=0)


class TestEvaluation:
    def test_uniform_model(self, model):
        _, words = model
        with torch.no_grad():
            flat = create(SPEC)
            flat.model.backbone.norm.weight.zero_()
        found = evaluate(flat, CORPUS, length=50, tokenizer=words, progress=False)
        assert found["perplexity"] == pytest.approx(258, rel=1e-5)
        # Every byte but the first of each document.
        assert found["bytes"] == found["tokens"] == CORPUS.bytes - len(CORPUS.documents)
        expected = math.log2(258) * found["tokens"] / found["bytes"]
        assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("length", [7, 64])
    def test_carried_state_equals_one_pass(self, model, length):
        made, words = model
        whole = evaluate(made, CORPUS, length=5000, tokenizer=words, progress=False)
        carried = evaluate(made, CORPUS, length=length, tokenizer=words, carry=True, progress=False)
        assert carried == pytest.approx(whole, rel=1e-5)

    def test_some_tokens_stand_for_the_text(self, model):
        made, words = model
        settings = {"tokenizer": words, "progress": False}
        everything = evaluate(made, CORPUS, length=50, **settings)
        assert everything["tokens"] == everything["text_tokens"]
        some = evaluate(made, CORPUS, length=50, tokens=500, **settings)
        assert 450 <= some["tokens"] <= 500
        assert some["text_tokens"] == everything["tokens"]
        assert some["loss"] == pytest.approx(everything["loss"], rel=0.02)
        with pytest.raises(RangeError, match="tokens=0"):
            evaluate(made, CORPUS, tokens=0, **settings)
        with pytest.raises(ConfigError, match="carry reads the whole text"):
            evaluate(made, CORPUS, tokens=500, carry=True, **settings)

    def test_foreign_model(self, model):
        _, words = model
        config = LlamaConfig(
            vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        llama = LlamaForCausalLM(config).eval()
        one = Corpus("one", ("to be or not to be",))
        found = evaluate(llama, one, length=64, tokenizer=words, progress=False)
        ids = torch.tensor([[*one.documents[0].encode()]])
        assert found["loss"] == pytest.approx(llama(ids, labels=ids).loss.item(), rel=1e-5)
        with pytest.raises(ConfigError, match="carry"):
            evaluate(llama, one, tokenizer=words, carry=True)

    def test_bytes_of_text_that_is_not_ascii(self):
        corpus = Corpus("greek", ("δβγ δβγ δβγ λ",) * 3)
        model, words = prepare(SPEC, "bpe:262", corpus, seed=0)
        first = encode(backend_of(words), corpus.documents[:1])[0][:1]
        found = evaluate(model, corpus, length=8, tokenizer=words, progress=False)
        lost = len(words.backend_tokenizer.id_to_token(int(first[0])))
        assert found["bytes"] == corpus.bytes - 3 * lost

    def test_tokenizer_that_is_not_byte_level(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        inside = Tokenizer(models.WordLevel({"δ": 0, "b": 1, "<eos>": 2}, unk_token="<eos>"))
        inside.pre_tokenizer = pre_tokenizers.Whitespace()
        words = PreTrainedTokenizerFast(tokenizer_object=inside, eos_token="<eos>")
        model = create(SPEC, vocabulary=3)
        found = evaluate(model, Corpus("w", ("δ b δ",)), tokenizer=words, progress=False)
        assert (found["tokens"], found["bytes"]) == (2, len(" b δ".encode()))
        with pytest.raises(DataError, match="follows another"):
            evaluate(model, Corpus("w", ("δ",)), tokenizer=words, progress=False)
