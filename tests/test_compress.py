"""Compressing as a user does it: one call to a checkpoint and a report, by recipe or budget, stopped and gone on."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import seqmix
from seqmix.cli import _pages, main
from seqmix.compress import TRANSFORMS, Calibration, Work, parse_recipe, write_recipe
from seqmix.core.errors import BudgetError, CheckpointError, ConfigError, UnknownName
from seqmix.core.files import OutputError
from seqmix.measure.footprint import stored_bytes
from seqmix.measure.zero_shot import continuation, facts, grammar, zero_shot
from seqmix.search import frontier
from seqmix.search.frontier import Trial, Trials, dominates, parse_limits

TEXT = "".join(
    f"{n} sheep and {n + 1} goats went over the hill of {n % 7} stones.\n" for n in range(400)
)
SMALL = {
    "length": 64,
    "windows": 4,
    "evaluation_tokens": 256,
    "questions": 2,
    "passkey_length": None,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small trained hybrid, and one with its text."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text(TEXT)
    seqmix.train(
        "attention, mamba2, attention",
        text,
        steps=30,
        length=64,
        batch=4,
        out=folder / "model",
        progress=False,
    )
    return folder / "model", text


def run(trained, out, **options):
    model, text = trained
    return seqmix.compress(model, text, out=out, progress=False, context=32, **{**SMALL, **options})


def test_a_recipe_gives_a_checkpoint_and_a_report(trained, tmp_path):
    made = run(trained, tmp_path / "small", recipe="finercut:0.2 | int8")
    assert [step["recipe"] for step in made.steps] == ["", "finercut(remove=0.2)", made.recipe]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    ids = torch.randint(3, 200, (1, 12))
    assert torch.equal(loaded(ids).logits, made.model(ids).logits)
    sizes = [step["figures"]["size_mb"] for step in made.steps]
    assert sizes[0] > sizes[1] > 2 * sizes[2]
    assert all(step["relative"]["loss"] > 0 for step in made.steps)
    page = made.report.read_text()
    assert "finercut" in page
    assert "Step by step" in page
    assert not list((tmp_path / "small").glob("checkpoints"))
    again = run(trained, tmp_path / "small", recipe="finercut:0.2 | int8")
    assert again.to_dict() == made.to_dict()


def test_the_original_stays_as_it_was(trained, tmp_path):
    before = {path.name: path.read_bytes() for path in trained[0].iterdir() if path.is_file()}
    run(trained, tmp_path / "small", recipe="int8")
    assert before == {p.name: p.read_bytes() for p in trained[0].iterdir() if p.is_file()}
    with pytest.raises(OutputError, match="holds no run"):
        run(trained, trained[0].parent, recipe="int8")


def test_a_stopped_run_goes_on_after_its_last_step(trained, tmp_path, monkeypatch):
    int8, fitted = TRANSFORMS.get("int8"), []
    finercut = TRANSFORMS.get("finercut")
    monkeypatch.setattr(int8, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(trained, tmp_path / "small", recipe="finercut:0.2 | int8")
    assert not (tmp_path / "small" / "config.json").exists()
    monkeypatch.undo()
    fit = finercut.fit
    monkeypatch.setattr(finercut, "fit", lambda *given: fitted.append(1) or fit(*given))
    run(trained, tmp_path / "small", recipe="finercut:0.2 | int8")
    assert not fitted
    with pytest.raises(CheckpointError, match="recipe"):
        run(trained, tmp_path / "small", recipe="int8")


def test_a_budget_gives_a_frontier(trained, tmp_path, monkeypatch):
    space = {"finercut": ("finercut:0.2",), "int8": ("int8",)}
    monkeypatch.setattr(frontier, "SPACE", space)
    made = run(trained, tmp_path / "found", budget="size_mb<0.5x, loss<1.5x", trials=6)
    found = made.frontier
    assert {"finercut(remove=0.2)", "int8"} <= {trial["recipe"] for trial in found["trials"]}
    assert found["chosen"] == made.recipe
    chosen = next(t for t in found["trials"] if t["recipe"] == made.recipe)
    assert chosen["excess"] == min(t["excess"] for t in found["trials"])
    assert {row["method"] for row in found["methods"]} == set(space)
    (tmp_path / "compression").mkdir()
    shutil.copy(tmp_path / "found" / "result.json", tmp_path / "compression" / "found.json")
    page = _pages.write_page("compression.md", tmp_path)  # no passkey was measured
    assert page.count("yes") == len(found["frontier"])
    assert "| `int8` |" in page


def test_domination_counts_every_metric():
    def trial(latency, loss, recipe="a"):
        return Trial(recipe, {"latency": latency, "loss": loss, "zero_shot": 1.0})

    metrics = ["latency", "loss"]
    assert dominates(trial(0.5, 1.0), trial(0.6, 1.0), metrics)
    assert not dominates(trial(0.5, 1.1), trial(0.6, 1.0), metrics)
    assert not dominates(trial(0.5, 1.0), trial(0.5, 1.0), metrics)
    rows = [trial(0.5, 1.0, "low"), trial(0.6, 1.0, "middle"), trial(0.9, 0.9, "good")]
    assert [t.recipe for t in Trials(rows, metrics, "low").frontier()] == ["low", "good"]
    shown = [Trial("a", {"zero_shot": 0.9}), Trial("b", {"zero_shot": 1.0})]
    assert dominates(shown[1], shown[0], ["zero_shot"])


def test_each_method_is_set_beside_the_combinations_on_the_frontier(monkeypatch):
    monkeypatch.setattr(
        frontier, "SPACE", {"blocks": ("blocks:0.1", "blocks:0.2"), "int8": ("int8",)}
    )
    rows = [
        Trial("blocks(remove=0.1)", {"latency": 0.9, "loss": 1.1}),
        Trial("blocks(remove=0.2)", {"latency": 0.8, "loss": 1.2}),
        Trial("int8", {"latency": 0.95, "loss": 1.0}),
        Trial("blocks | int8", {"latency": 0.85, "loss": 1.15}),
        Trial("slice | int8", {"latency": 0.7, "loss": 1.2}),
        Trial("slice", {"latency": 0.7, "loss": 1.1}),
        Trial("recover | int8", {}, failed="no"),
    ]
    found = Trials(rows, ["latency", "loss"], "int8").methods()
    assert [row["dominated by"] for row in found] == [None, None, None]  # by `slice`, which is one
    found = Trials(rows[:5], ["latency", "loss"], "int8").methods()
    assert [(row["recipe"], row["dominated by"]) for row in found] == [
        ("blocks(remove=0.1)", None),
        ("blocks(remove=0.2)", "slice | int8"),
        ("int8", None),
    ]
    chosen = frontier.first_trials()
    assert chosen[:3] == [{"blocks": "blocks:0.1"}, {"blocks": "blocks:0.2"}, {"int8": "int8"}]
    assert chosen[3:] == [{"blocks": "blocks:0.1", "int8": "int8"}]


def test_what_cannot_be_is_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="either a recipe or a budget"):
        run(trained, tmp_path / "x")
    with pytest.raises(UnknownName, match="finercut"):
        run(trained, tmp_path / "x", recipe="finecut:0.1")
    with pytest.raises(ConfigError, match="does not parse"):
        parse_recipe("int8 | | int8")
    with pytest.raises(ConfigError, match="twice"):
        parse_recipe("finercut:0.1(remove=0.2)")
    with pytest.raises(BudgetError, match="latency"):
        parse_limits("latancy<0.6x")
    assert str(parse_limits("latency<0.6x, loss<=3")[0]) == "latency<0.6x"
    assert not (tmp_path / "x").exists()


def test_recipes_are_written_as_they_are_read():
    text = "finercut(remove=0.1) | int8"
    assert write_recipe(parse_recipe("finercut:0.1|int8")) == text
    assert write_recipe(parse_recipe(text)) == text


def test_the_command_answers_with_one_object(trained, tmp_path, capsys):
    model, text = map(str, trained)
    command = [
        "compress",
        model,
        "--data",
        text,
        "--out",
        str(tmp_path / "small"),
        "--recipe",
        "int8",
    ]
    options = ["--length", "64", "--windows", "4", "--evaluation-tokens", "256", "--questions", "0"]
    # The passkey needs longer texts than this tokeniser's bytes allow at the default length.
    assert main([*command, *options, "--passkey-length", "0", "--context", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == "int8"
    assert found["steps"][-1]["relative"]["size_mb"] < 0.5


def test_zero_shot_questions_have_one_answer_each():
    for questions in (grammar(100, 0), facts(100, 0), continuation(TEXT, 5, 0)):
        for question in questions:
            assert len(set(question.endings)) == len(question.endings)
            assert 0 <= question.answer < len(question.endings)
    right = [q.answer for q in facts(100, 0)]
    assert len(set(right)) == 4


def test_zero_shot_knows_a_model_that_knows(trained):
    """A model that gives every right ending its likelihood scores 1, one that gives it to a wrong one 0."""
    _, tokenizer = seqmix.load(trained[0])

    class Knowing(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, sign):
            super().__init__()
            self.sign = sign
            self.right = {
                tokenizer.decode(tokenizer(q.context + q.endings[q.answer])["input_ids"])
                for q in [*grammar(9, 0), *facts(9, 0)]
            }

        def forward(self, input_ids, attention_mask, use_cache):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
                known = tokenizer.decode(ids[mask.bool()]) in self.right
                place = torch.arange(ids.shape[0] - 1)
                logits[row, place, ids[1:]] = self.sign * (2.0 if known else 1.0)

            class Output:
                pass

            Output.logits = logits
            return Output

    assert zero_shot(Knowing(1.0), tokenizer, questions=9)["mean"] == 1.0
    assert zero_shot(Knowing(-1.0), tokenizer, questions=9)["mean"] == 0.0


def test_tied_weights_count_once(trained):
    model, _ = seqmix.load(trained[0])
    numbers = sum(p.numel() for p in model.parameters())
    assert stored_bytes(model.model) == 4 * numbers
    assert Calibration(windows=torch.zeros(4, 8)).first(9).shape == (2, 8)
    assert Work().remember("x", lambda: 3) == 3


def test_attention_gives_way_to_another_mixer(trained, tmp_path):
    model, text = trained
    made = seqmix.convert(
        model,
        text,
        to="liger",
        keep_attention=0.5,
        transfer_tokens=256,
        recover_tokens=128,
        out=tmp_path / "liger",
        progress=False,
        context=32,
        **SMALL,
    )
    kinds = [type(block.mixer).__name__ for block in made.model.model.backbone.blocks]
    assert sorted(kinds) == ["Attention", "Liger", "Mamba2"]
    assert len(made.steps) == 3
    with pytest.raises(ConfigError, match="follows from `to`"):
        seqmix.convert(model, text, to="liger", out=tmp_path / "x", recipe="int8")
