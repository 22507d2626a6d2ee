"""Laws of the code base itself: imports, sizes, what may be written, and that one file is a whole mixer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FOLDERS = ("src", "tests", "examples", "docs", ".ci")
ENDINGS = (".py", ".md", ".toml", ".yml", ".yaml", ".json", ".txt", "run", "Makefile")
TEXTS = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and path.name.endswith(ENDINGS) and path != Path(__file__)
] + [path for path in sorted(ROOT.iterdir()) if path.is_file() and path.name.endswith(ENDINGS)]
LONG_FILES: dict[str, str] = {  # file -> why it is longer than 400 lines
    "src/seqmix/testing/operators.py": "every law of operators, in one place to read",
    "src/seqmix/testing/mixers.py": "every law of mixers, in one place to read",
}


OPTIONAL = {"transformers", "optuna", "plotly", "accelerate", "datasets", "peft", "gguf"}


def python(script, **environment):
    """Runs a script in a fresh interpreter and returns the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_lean():
    """Neither an optional package nor our own parts: so `import seqmix` adds next to nothing."""
    script = """
import json, sys
import torch
before = set(sys.modules)
import seqmix
dir(seqmix)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = python(script)
    assert not {name.partition(".")[0] for name in loaded} & OPTIONAL
    ours = [name for name in loaded if name.startswith("seqmix.")]
    assert {name.split(".")[1] for name in ours} <= {"core", "models"}
    assert len(ours) <= 6, ours


def test_ops_and_mixers_load_nothing_optional():
    script = """
import json, sys
import seqmix
seqmix.ops.linear_attention, seqmix.mixers.MIXERS.get("gated_linear_attention")
print(json.dumps(sorted(sys.modules)))
"""
    assert not {name.partition(".")[0] for name in python(script)} & OPTIONAL


STUBS = {  # a package like ours, with our top level and nothing behind it
    "train/__init__.py": "from seqmix.train.language import evaluate, train",
    "train/language.py": "def train(): pass\ndef evaluate(): pass",
    "generate/__init__.py": "from seqmix.generate.text import generate",
    "generate/text.py": "def generate(): pass",
    "models/__init__.py": "",
    "models/registration.py": "def register_with_transformers(): pass",
}
ORDERS = [
    "import seqmix; seqmix.train",
    "import seqmix.train",
    "import seqmix.train.language, seqmix.generate.text",
    "from seqmix.train import evaluate; from seqmix.generate import generate",
    "from seqmix import train; import seqmix.train",
    "import importlib; importlib.import_module('seqmix.train')",
]


@pytest.mark.parametrize("order", ORDERS)
def test_functions_hide_the_packages_of_their_names_in_every_order_of_import(order, tmp_path):
    shutil.copytree(
        ROOT / "src/seqmix", tmp_path / "seqmix", ignore=lambda _, names: {*names} - {"__init__.py"}
    )
    for file, text in STUBS.items():
        (tmp_path / "seqmix" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "seqmix" / file).write_text(text)
    script = f"""
import json
{order}
import seqmix
from seqmix import train, generate
from seqmix.train import evaluate, train as inner
import seqmix.train as named
print(json.dumps([
    [type(f).__name__ for f in (seqmix.train, seqmix.generate, seqmix.evaluate)],
    train is inner is named is seqmix.train,
    evaluate is seqmix.evaluate,
]))
"""
    assert python(script, PYTHONPATH=str(tmp_path)) == [["function"] * 3, True, True]


def test_every_public_name_is_there():
    import seqmix

    functions = ("compare", "evaluate", "generate", "load", "reproduce", "train")
    assert {type(getattr(seqmix, name)).__name__ for name in functions} == {"function"}
    assert seqmix.ops.OPERATORS.names()
    assert seqmix.mixers.MIXERS.names()
    assert set(seqmix.__all__) <= set(dir(seqmix))


def test_an_unknown_public_name_is_an_attribute_error():
    import seqmix

    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        seqmix.trian


def test_imports_go_one_way():
    lint = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if lint is None:
        pytest.skip("import-linter is not installed: pip install 'seqmix[lint]'")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def name(path):
    return str(path.relative_to(ROOT))


def test_files_keep_to_the_size_budget():
    lengths = {name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in lengths.items() if lines > 1000} == {}
    long = {path for path, lines in lengths.items() if lines > 400}
    assert long - set(LONG_FILES) == set(), "split it, or give the reason in LONG_FILES"
    assert set(LONG_FILES) - long == set(), "it is short again: remove its entry from LONG_FILES"


FORBIDDEN = {
    "a path of somebody's machine": re.compile(r"/(home|work|Users)/\w|/root/|\bC:\\\\"),
    "a TODO without a link": re.compile(r"\b(TODO|FIXME|XXX)\b(?!.*https?://)"),
    "an error that is swallowed": re.compile(r"except (Base)?Exception:\s*\n?\s*pass\b"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_forbidden_is_written(what):
    for path in TEXTS:
        found = FORBIDDEN[what].search(path.read_text(encoding="utf-8"))
        assert found is None, f"{name(path)} holds {what}: {found[0]!r}"


def test_no_committed_file_is_large():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git work tree")
    files = [ROOT / line for line in done.stdout.split("\0") if line]
    assert [name(path) for path in files if path.exists() and path.stat().st_size > 250_000] == []


@pytest.fixture(scope="module")
def copy_with_toy(tmp_path_factory):
    """A copy of the sources with one more file: the mixer that docs/add-a-mixer.md shows."""
    folder = tmp_path_factory.mktemp("sources")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "seqmix", folder / "seqmix", ignore=ignored)
    page = (ROOT / "docs" / "add-a-mixer.md").read_text()
    toy = page.split("```python\n")[1].split("```")[0]
    (folder / "seqmix" / "mixers" / "decayed_sum.py").write_text(toy)
    return folder


def test_one_file_is_a_whole_mixer(copy_with_toy):
    script = """
import contextlib, io, json
from pathlib import Path
import seqmix
from seqmix.cli import main
from seqmix.cli._pages import write_page
from seqmix.measure.candidates import split_candidates
from seqmix.models.backbone import ModelSpec, count_parameters

def output(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(arguments) == 0
    return out.getvalue()

print(json.dumps({
    "source": seqmix.__file__,
    "list": json.loads(output("list", "mixers", "--json"))["mixers"],
    "explain": output("explain", "decayed_sum"),
    "page": write_page("mixers.md", Path("claims")),
    "candidates": split_candidates("attention; 3x[decayed_sum], attention"),
    "parameters": count_parameters(ModelSpec(layout="decayed_sum")),
}))
"""
    found = python(script, PYTHONPATH=str(copy_with_toy))
    assert found["source"].startswith(str(copy_with_toy))
    described = {entry["name"]: entry["description"] for entry in found["list"]}
    assert described["decayed_sum"].startswith("Decayed sum: ")
    assert "MIXER decayed_sum" in found["explain"]
    assert "\n## decayed_sum\n" in found["page"]
    assert found["candidates"] == ["attention", "3x[decayed_sum], attention"]
    assert found["parameters"] > 0


def test_the_battery_runs_over_a_new_file(copy_with_toy):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "decayed_sum", str(ROOT / "tests" / "test_mixers.py")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(copy_with_toy)},
    )
    assert done.returncode == 0, done.stdout
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 20
