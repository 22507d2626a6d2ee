"""Training after other steps: any cheaper model learns, from text or a teacher, keeps its shape, and goes on."""

import copy
import dataclasses

import pytest
import torch

from seqmix.compress import Calibration, Work, parse_recipe, recover
from seqmix.core.errors import ConfigError
from seqmix.data.text import Corpus
from seqmix.models.hf import SeqmixForCausalLM, create
from seqmix.train import loop
from seqmix.train.language import prepare

CHEAPER = {  # by what a step before has made
    "whole": "",
    "linear": "linearize:liger(keep=0, transfer_tokens=24)",
    "hybrid": "linearize:mamba2(keep=0.5, transfer_tokens=24)",
    "pruned": "finercut:0.25",
    "factors": "low_rank:0.3",
    "rounded": "int8",
    "sliced": "slice:0.2",
}


def tiny(layout="2x[attention]"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create(layout, width=32, heads=2, vocabulary=50).eval()


def text(**fields):
    row = torch.arange(24) * 7 % 50
    return Calibration(windows=torch.stack([row.roll(n) for n in range(8)]), **fields)


def fit(recipe, model, data=None, work=None):
    work = work or Work()
    for step in parse_recipe(recipe):
        model = step.fit(model, data or text(), work)
    return model


@torch.no_grad()
def loss(model):
    windows = text().windows
    return float(model(windows, labels=windows).loss)


@torch.no_grad()
def logits(model):
    return model(text().windows[:2]).logits


@pytest.mark.parametrize("kind", CHEAPER)
@pytest.mark.parametrize("parameters", ["lora", "all"])
def test_every_cheaper_model_recovers(kind, parameters, tmp_path):
    if kind in ("rounded", "factors") and parameters == "lora":
        pytest.skip("no dense layer is left, which has a test of its own")
    given = fit(CHEAPER[kind], tiny()) if CHEAPER[kind] else tiny()
    before = copy.deepcopy(given.state_dict())
    work = Work()
    made = fit(
        f"recover:384(parameters={parameters}, learning_rate=0.01, batch=4)", given, work=work
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in given.state_dict().items())
    assert loss(made) < loss(given)
    assert work.notes["tokens"] == 384
    assert work.notes["seconds"] >= 0
    assert made.config.to_spec() == given.config.to_spec()
    assert [p.requires_grad for p in made.parameters()] == [
        p.requires_grad for p in given.parameters()
    ]
    made.save_pretrained(tmp_path)
    loaded = SeqmixForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(made), rtol=0, atol=0)


def test_a_teacher_is_learnt_from_and_only_where_there_is_one():
    teacher = tiny()
    with torch.no_grad():  # of strong opinions, which differ from what the text says
        teacher.model.embedding.weight.mul_(40)
    data = text(teacher=teacher)

    def distance(model):
        with torch.no_grad():
            p, q = (m(data.windows).logits.log_softmax(-1) for m in (teacher, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    given, work = tiny("2x[liger]"), Work()
    how = "parameters=all, learning_rate=0.01, batch=4"
    alone = fit(f"recover:384({how})", given)
    taught = fit(f"recover:384(distillation=1.0, {how})", given, data, work)
    assert work.notes["distillation"] == 1.0
    assert distance(taught) < min(distance(given), distance(alone))
    fit("recover:24", given, data, work)
    assert work.notes["distillation"] == 0.5
    with pytest.raises(ConfigError, match="needs a teacher"):
        fit("recover:24(distillation=0.5)", given)


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    given, recipe = tiny("attention, liger"), "recover:240(batch=2, learning_rate=0.01)"
    whole = fit(recipe, given)

    draw, calls = recover.in_turns, []

    def stopping(windows, batch, seed):
        batches = draw(windows, batch, seed)

        def one(index):
            calls.append(index)
            if len(calls) == 4:
                raise MemoryError("stopped here")
            return batches(index)

        return one

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(recover, "in_turns", stopping)
    with pytest.raises(MemoryError):
        fit(recipe, given, work=Work(folder=tmp_path))
    work = Work(folder=tmp_path)
    resumed = fit(recipe, given, work=work)
    assert min(calls[4:]) >= 2, "it began again"
    torch.testing.assert_close(logits(resumed), logits(whole))
    assert work.notes["tokens"] == 240
    calls.clear()
    again = fit(recipe, given, work=Work(folder=tmp_path))
    assert not calls
    torch.testing.assert_close(logits(again), logits(resumed), rtol=0, atol=0)


def test_more_text_comes_from_the_corpus():
    corpus = Corpus("numbers", (" ".join(map(str, range(400))),))
    _, tokenizer = prepare("attention", "bytes", corpus, seed=0)
    data = text(corpus=corpus, tokenizer=tokenizer)
    assert data.with_at_least(100) is data.windows
    assert data.with_at_least(480).shape == (20, 24)
    assert len(text().with_at_least(480)) == 8


def test_impossible_options_are_refused():
    for wrong in ("tokens=0", "parameters=prefix", "learning_rate=0.0", "distillation=2.0"):
        with pytest.raises(ConfigError, match="recover: "):
            parse_recipe(f"recover({wrong})")
    rounded = fit("int8", tiny())
    with pytest.raises(ConfigError, match="no dense layer"):
        fit("recover", rounded)
    step = parse_recipe("recover:1000")[0]
    assert step.needs(tiny(), text()).training_tokens == 1000
    assert step.needs(tiny(), dataclasses.replace(text(), teacher=tiny())).forward_tokens == 1000
