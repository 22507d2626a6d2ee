"""The pages of the server: one to ask it in a browser, and those of reports and claims."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'seqmix[serve]'")
from fastapi.testclient import TestClient
from tiny_server import running, tiny_served

from seqmix.serve.answers import Served
from seqmix.serve.app import create_app
from seqmix.serve.engine import Engine
from seqmix.serve.reports import Reports

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def served():
    return tiny_served()


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, pytest.param(1200, marks=pytest.mark.slow)])
def test_the_page_streams_an_answer_without_errors(served, tmp_path, width):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900"]
    engine = Engine(served.engine.reader, served.engine.limits)
    with running(create_app([Served("tiny", engine, served.tokenizer)])) as url:
        done = subprocess.run([*command, f"{url}/?run"], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert 'data-runs="1"' in done.stdout
    assert re.search(r"\b64 tokens, [\d.]+ tokens/s", done.stdout)
    assert "states 0" not in done.stdout


RECORD = {
    "id": "a-claim",
    "title": "A <b>paper</b>",
    "paper": "arXiv:1",
    "where": "section 1",
    "claimed": "it is so",
    "size": "full",
    "verdict": "reproduced",
    "seconds": 1.0,
    "findings": [
        {"statement": "s", "expected": "e", "measured": {"loss": 1.5}, "verdict": "reproduced"}
    ],
}


@pytest.fixture
def pages(served, tmp_path):
    """A server of reports, which is not started."""
    folder = tmp_path / "runs"
    (folder / "compare x").mkdir(parents=True)
    (folder / "compare x/report.html").write_text("the <i>report</i>")
    (folder / "a-claim.json").write_text(json.dumps(RECORD))
    (folder / "other.json").write_text("[1]")
    (folder / "notes.txt").write_text("secret")
    (tmp_path / "outside.html").write_text("secret")
    (folder / "link.html").symlink_to(tmp_path / "outside.html")
    app = create_app([served], reports=Reports(folder))
    return TestClient(app)


def test_reports_and_claims_are_pages(pages):
    assert 'href="/reports"' in pages.get("/").text
    index = pages.get("/reports").text
    assert set(re.findall(r'href="(.*?)"', index)) - {"data:,"} == {
        "/reports/claims",
        "/reports/compare%20x/report.html",
        "/",
    }
    report = pages.get("/reports/compare%20x/report.html")
    assert report.text == "the <i>report</i>"
    assert "sandbox" in report.headers["content-security-policy"]
    claims = pages.get("/reports/claims").text
    assert "A &lt;b&gt;paper&lt;/b&gt;" in claims
    assert "loss 1.5" in claims


@pytest.mark.parametrize(
    "name",
    [
        "../outside.html",
        "..%2Foutside.html",
        "%2e%2e/outside.html",
        "compare%20x/../../outside.html",
        "link.html",
        "notes.txt",
        "a-claim.json",
        "%00",
        "/etc/passwd",
        "compare x",
    ],
)
def test_nothing_outside_of_the_reports_is_reachable(pages, name):
    answer = pages.get(f"/reports/{name}")
    assert answer.status_code == 404
    assert "secret" not in answer.text


def test_without_reports_there_is_no_such_page(served):
    client = TestClient(create_app([served]))
    assert client.get("/reports").status_code == 404
    assert "LINKS" not in client.get("/").text
