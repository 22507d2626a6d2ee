"""What the documentation shows works: its Python runs, its commands parse, its examples run, its pages are whole."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from seqmix.cli._describe import KINDS, catalog
from seqmix.cli._main import application
from seqmix.cli._pages import NAMES, pages, write_page
from seqmix.core import errors
from seqmix.core.files import OutputError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEXT = "To be, or not to be, that is the question.\n" * 60
SMALLER = {  # what a test runs instead of what a reader would
    '"shakespeare"': '"corpus.txt"',
    "steps=500": "steps=1, length=32, batch=1",
    "new_tokens=100": "new_tokens=2",
    "new_tokens=50": "new_tokens=2",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a small corpus in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(TEXT)
    return tmp_path


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def names(paths):
    return [path.name for path in paths]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_of_a_page_runs_from_top_to_bottom(page, folder):
    namespace = {"__name__": "page"}
    for number, text in enumerate(blocks(page, "python")):
        for shown, run in SMALLER.items():
            text = text.replace(shown, run)
        exec(compile(text, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=lambda p: p.name)
def test_commands_of_a_page_parse(page):
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["seqmix"]:
            command = get_command(application(words[1:])).get_command(None, words[1])
            assert command is not None, line
            command.make_context(words[1], words[2:])
        if words[:1] == ["make"]:
            assert words[1] in targets, line


def load_example(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETTINGS = {
    "compare_two_mixers": {
        "data": "corpus.txt",
        "out": "two",
        "width": 16,
        "depth": 1,
        "heads": 2,
        "length": 32,
        "batch": 2,
        "tokens": 128,
        "contexts": [64, 2048],
        "progress": False,
    },
    "own_mixer": {"steps": 3},
    "pack_documents": {},
    "states": {},
    "train_and_generate": {"data": "corpus.txt", "out": "hybrid", "steps": 1, "length": 32},
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, folder, capsys):
    result = load_example(path).main(**SETTINGS[path.stem])
    assert result is not None
    assert capsys.readouterr().out
    if path.stem == "pack_documents":
        assert result < 1e-4


def test_the_own_mixer_learns():
    assert load_example(ROOT / "examples/own_mixer.py").main(steps=150) < 0.2


def test_every_example_is_short_and_tested():
    assert set(SETTINGS) == {path.stem for path in EXAMPLES}
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 60, path.name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_hand_written_pages_are_short_and_their_links_exist(page):
    text = page.read_text()
    assert len(text.splitlines()) <= 150
    generated = set(NAMES)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists() or target in generated, target


def test_generated_pages_describe_every_entry(tmp_path):
    made = pages(tmp_path)
    for kind in KINDS:
        if kind != "corpora":
            page = made[f"{kind}.md"]
            for name in catalog(kind):
                title = name.replace("_", "-") if kind == "claims" else name
                assert f"\n## {title}\n" in page, (kind, name)


def test_claims_page_shows_the_kept_record_and_nothing_else(tmp_path):
    import json

    identifier = catalog("claims").names()[0].replace("_", "-")
    assert "no full run is kept" in write_page("claims.md", tmp_path)
    record = {
        "title": "A title",
        "paper": "arXiv:0",
        "where": "Table 9",
        "claimed": "What is claimed",
        "size": "full",
        "seconds": 12.3,
        "date": "2000-01-01",
        "verdict": "not reproduced",
        "machine": {"cpu": "a cpu", "threads": 2, "versions": {"torch": "9.9"}, "commit": "abc"},
        "findings": [
            {
                "statement": "a | b",
                "expected": "more",
                "measured": {"gap": -1},
                "verdict": "not reproduced",
            }
        ],
    }
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / f"{identifier}.json").write_text(json.dumps(record))
    page = write_page("claims.md", tmp_path)
    for shown in ("Table 9", "a \\| b", "gap -1", "**not reproduced**", "a cpu", "commit abc"):
        assert shown in page


def test_every_error_is_documented():
    text = (ROOT / "docs/errors.md").read_text()
    kinds = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, Exception)]
    for kind in [*kinds, OutputError]:
        assert f"`{kind.__name__}`" in text or f".{kind.__name__}`" in text, kind.__name__
