"""The command line: what it prints where, its exit codes, and that its answers are the functions' answers."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shlex
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import transformers
from typer.main import get_command

from seqmix import __version__
from seqmix.cli import COMMANDS, main
from seqmix.cli._describe import KINDS
from seqmix.cli._main import application
from seqmix.core.errors import DataError, NumericalError
from seqmix.models.backbone import ModelSpec, count_parameters
from seqmix.ops import OPERATORS

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n" * 40


@pytest.fixture
def command(capfd):
    """Runs a command in this process and returns its exit code, and all that went to stdout and stderr."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


def answer(result):
    """The one JSON object of a successful command."""
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def parse(arguments):
    """The parsed options of a command line, without running it."""
    subcommand = get_command(application(arguments)).get_command(None, arguments[0])
    return subcommand.make_context(arguments[0], list(arguments[1:]))


@pytest.mark.parametrize("name", COMMANDS.names())
def test_every_help_shows_an_example_that_parses(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert "Example: " in out
    text = COMMANDS.get(name).__doc__
    example = text[text.index("Example: `") :].split("`")[1]
    words = shlex.split(example)
    assert words[:2] == ["seqmix", name]
    parse(words[1:])


def test_help_is_fast_because_it_loads_nothing_heavy():
    script = (
        "import sys; from seqmix.cli import main; main(['--help']); main(['train', '--help']); "
        "print([m for m in ('torch', 'numpy', 'transformers', 'optuna', 'plotly') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in COMMANDS)


def test_python_dash_m_is_the_same_command():
    words = [sys.executable, "-m", "seqmix", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


def test_unknown_command_is_a_usage_error(command):
    code, out, err = command("compere")
    assert code == 2
    assert "compere" in err
    assert not out


@pytest.mark.parametrize("kind", KINDS)
def test_list_describes_every_entry(command, kind):
    entries = answer(command("list", kind, "--json"))[kind]
    assert all(entry["description"].strip() for entry in entries)
    _, table, _ = command("list", kind)
    assert all(entry["name"] in table for entry in entries)


def test_list_shows_all_kinds(command):
    assert list(answer(command("list", "--json"))) == list(KINDS)


def test_wrong_names_get_suggestions_and_no_traceback(command):
    for arguments in (["list", "mixer"], ["explain", "gated_delta_nett"]):
        code, out, err = command(*arguments)
        assert code == 2
        assert "Did you mean" in err
        assert "Traceback" not in err
        assert not out


@pytest.mark.parametrize("name", OPERATORS.names())
def test_explain_says_which_form_runs_and_why_not_the_others(command, name):
    record = answer(command("explain", name, "--json"))["operator"]
    operator = OPERATORS.get(name)
    assert record["equation"] == operator.equation
    for case in record["cases"]:
        can_run = [form for form in operator.forms if case["why_not"][form] is None]
        assert case["chosen"] == (can_run[0] if can_run else "definition")
    _, table, _ = command("explain", name)
    assert "chosen" in table
    assert all(form in table for form in operator.forms)


def test_explain_mixer_and_channel(command):
    mixer = answer(command("explain", "gated-linear-attention", "--json"))["mixer"]
    assert mixer["state_bytes"]["1024"] == mixer["state_bytes"]["8192"]
    assert {"field": "gate_rank", "type": "int", "default": 16} in mixer["config"]
    _, table, _ = command("explain", "gated_linear_attention")
    assert "gate_rank" in table
    assert f"{mixer['parameters']:,} parameters" in table
    assert "expansion" in command("explain", "glu")[1]


def test_explain_layout_counts_what_the_model_has(command):
    layout = "2x[gated_linear_attention], gated_delta_net/none"
    record = answer(command("explain", layout, "--width", 32, "--heads", 2, "--json"))["layout"]
    assert record["parameters"] == count_parameters(ModelSpec(layout=layout, width=32, heads=2))
    assert [block["entry"] for block in record["blocks"]][-1] == "gated_delta_net/none"
    assert "prefill flops" in command("explain", layout)[1]


@pytest.mark.parametrize(("kind", "layout"), [("LlamaConfig", "attention"), ("Gemma2Config", None)])
def test_explain_a_model_shows_its_layout_or_why_it_has_none(command, tmp_path, kind, layout):
    config = getattr(transformers, kind)(num_hidden_layers=2, vocab_size=64)
    config.save_pretrained(tmp_path)
    records = answer(command("explain", tmp_path, "--json"))
    assert records["model"]["class"] == kind.replace("Config", "ForCausalLM")
    if layout is None:
        assert "model_type='gemma2'" in records["model"]["not imported"]
    else:
        assert [b["entry"].partition("(")[0] for b in records["layout"]["blocks"]] == [layout] * 2


def test_a_layout_that_does_not_parse_shows_a_caret(command):
    code, _, err = command("explain", "3x[gated_linear_attention")
    assert code == 2
    assert err.splitlines()[-1].strip() == "^"


def test_train_eval_generate(command, corpus, tmp_path):
    folder = tmp_path / "model"
    layout = "gated_delta_net, gated_linear_attention"
    sizes = ["--width", 16, "--heads", 2, "--length", 32, "--batch", 2]
    arguments = ["train", corpus, "--model", layout, "--out", folder, "--steps", 2, *sizes]
    trained = answer(command(*arguments, "--json"))
    assert trained["steps"] == 2
    assert trained["tokens"] == 2 * 2 * 32
    assert any(form.startswith("delta_rule: ") for form in trained["forms"])

    scored = answer(command("eval", folder, "--data", corpus, "--length", 64, "--json"))
    assert scored["perplexity"] == pytest.approx(math.exp(scored["loss"]))
    nats = scored["loss"] * scored["tokens"]
    assert scored["bits_per_byte"] == pytest.approx(nats / math.log(2) / scored["bytes"])
    assert scored["bytes"] == len(TEXT.encode()) - 1  # all but the first, which nothing precedes

    limited = answer(
        command("eval", folder, "--data", corpus, "--length", 64, "--tokens", 640, "--json")
    )
    assert limited["tokens"] <= 640 < limited["text_tokens"] == scored["tokens"]
    code, _, err = command("eval", folder, "--data", corpus, "--tokens", "most")
    assert (code, "'most'" in err, "'all'" in err) == (2, True, True)

    generate = ["generate", folder, "--prompt", "The quick", "--new-tokens", 5]
    written = answer(command(*generate, "--json"))
    code, out, _ = command(*generate)
    assert code == 0
    assert out.rstrip("\n") == written["text"].rstrip("\n")
    diverse = answer(command(*generate, "--groups", 2, "--beams", 2, "--texts", 3, "--json"))
    assert len(diverse["texts"]) == 3
    assert diverse["text"] == diverse["texts"][0]["text"]
    code, _, err = command(*generate, "--beams", 2, "--min-p", 0.1)
    assert (code, "Choose one" in err) == (2, True)
    for guessed in (["--draft", folder], ["--lookup"], ["--lookup", "--branches", 2]):
        assert answer(command(*generate, *guessed, "--json"))["text"] == written["text"]
    code, _, err = command(*generate, "--lookup", "--beams", 2)
    assert (code, "--lookup goes with" in err) == (2, True)
    chosen = answer(command(*generate, "--choice", "cat", "--choice", "dog", "--json"))
    assert chosen["text"] in ("The quickcat", "The quickdog")
    code, _, err = command(*generate, "--pattern", "(a")
    assert (code, "unclosed group" in err) == (2, True)

    code, out, _ = command(*arguments)  # the finished run is found again, not trained again
    assert code == 0
    assert "2 steps" in out


def test_options_of_a_layout_do_not_fit_a_trained_model(command, corpus, tmp_path):
    (tmp_path / "model").mkdir()
    code, _, err = command(
        "train",
        corpus,
        "--model",
        tmp_path / "model",
        "--width",
        8,
        "--steps",
        1,
        "--out",
        tmp_path / "new",
    )
    assert code == 2
    assert "width" in err


def test_missing_data_is_an_input_error(command, tmp_path):
    out = tmp_path / "model"
    code, _, err = command(
        "train", tmp_path / "no.txt", "--model", "mamba2", "--steps", 1, "--out", out
    )
    assert code == 2
    assert "no.txt" in err
    assert not out.exists()


def fails_with(error):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "The same command goes on"),
        (NumericalError("The loss is not finite at step 3."), 1, "step 3"),
        (DataError("The file [bold]x[/bold] is empty."), 2, "[bold]x[/bold]"),
    ],
)
def test_exit_codes(command, monkeypatch, tmp_path, error, code, said):
    monkeypatch.setattr(import_module("seqmix.train"), "train", fails_with(error))
    got, out, err = command("train", "x", "--model", "mamba2", "--out", tmp_path / "model")
    assert got == code
    assert said in err
    assert "Traceback" not in err
    assert not out


def test_a_bug_keeps_its_traceback(command, monkeypatch, tmp_path):
    monkeypatch.setattr(import_module("seqmix.train"), "train", fails_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        command("train", "x", "--model", "mamba2", "--out", tmp_path / "model")


def test_what_a_computation_prints_does_not_reach_stdout(command, monkeypatch):
    def chatty(*arguments, **options):
        print("a library talks")
        return {"perplexity": 2.0, "bits_per_byte": float("inf"), "loss": float("nan")}

    monkeypatch.setattr(import_module("seqmix.train"), "evaluate", chatty)
    code, out, err = command("eval", "m", "--data", "d", "--json")
    assert code == 0
    assert json.loads(out) == {"perplexity": 2.0, "bits_per_byte": None, "loss": None}
    assert "a library talks" in err


def test_compare_hands_on_every_option(command, monkeypatch, tmp_path):
    module = import_module("seqmix.measure.compare")
    given = {}

    class Found:
        def to_dict(self):
            return {"out": tmp_path}

    def compare(data, candidates, **options):
        given.update(options, data=data, candidates=candidates)
        return Found()

    monkeypatch.setattr(module, "compare", compare)
    numbers = {"seeds": 2, "width": 32, "depth": 2, "heads": 2, "length": 64, "batch": 4}
    numbers |= {"tokens": 100, "parameters": 5000, "learning_rate": 0.01, "contexts": [64, 128]}
    settings = {
        "candidates": ["mamba2", "2x[mamba2], attention"],
        "equal": ["parameters", "tokens"],
        "preset": "standard",
        "tokenizer": "bytes",
        **numbers,
    }
    line = module.reproduce_command(
        "my text.txt", settings, budget="decode_ms<2@64", out=tmp_path, storage=None
    )
    words = shlex.split(line)
    assert answer(command(*words[1:], "--json")) == {"out": str(tmp_path)}
    expected = settings | {
        "data": "my text.txt",
        "candidates": "mamba2; 2x[mamba2], attention",
        "equal": "parameters, tokens",
        "budget": "decode_ms<2@64",
        "out": tmp_path,
    }
    assert {name: given[name] for name in expected} == expected


def test_compare_refuses_contexts_that_are_no_numbers(command):
    code, _, err = command("compare", "--data", "x", "--candidates", "mamba2", "--contexts", "8k")
    assert code == 2
    assert "8k" in err


def test_reproduce_lists_and_needs_a_name(command):
    listed = answer(command("reproduce", "--list", "--json"))["claims"]
    assert listed == answer(command("list", "claims", "--json"))["claims"]
    code, _, err = command("reproduce")
    assert code == 2
    assert "--list" in err


def test_doctor_says_how_to_get_what_is_missing(command, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "plotly":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    record = answer(command("doctor", "--json"))
    assert record["machine"]["torch"] == torch.__version__
    for entry in [*record["packages"], *record["assets"]]:
        assert bool(entry["found"]) != bool(entry["get"]), entry
    plotly = next(entry for entry in record["packages"] if entry["name"] == "plotly")
    assert plotly["get"] == "pip install 'seqmix[compare]'"
    assert "To get plotly:" in command("doctor")[1]
