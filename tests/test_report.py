"""The report of a comparison: what the page says, and that a browser shows it, on a phone too."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from seqmix.core.errors import MissingExtra
from seqmix.report import page, plots
from seqmix.report.compare import render

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
BEST, LONG = "gated_delta_net", "3x[gated_delta_net], attention"


def record(name, seed, quality, speed):
    figure = {"low": 0.9 * speed, "median": speed, "high": 1.2 * speed, "repeats": 3}
    contexts = {"512": 1.0, "8192": 2.0}
    memory = {"baseline_mb": 200.0, "peak_mb": 250.0, "memory_mb": 50.0}
    serve = {
        "parameters": 468000,
        "decode_ms": {
            c: {k: v * factor for k, v in figure.items()} | {"predicted": 0.1 * factor}
            for c, factor in contexts.items()
        },
        "prefill_tokens_s": {c: figure | {"predicted": 2.0 * speed} for c in contexts},
        "state_bytes": {c: {"measured": 1024, "predicted": 1024} for c in contexts},
    }
    history = [
        {"step": i, "tokens": 100 * i, "seconds": i / 10, "loss": 2 + 3 / i} for i in range(1, 30)
    ]
    return {
        "candidate": name,
        "seed": seed,
        "state": "complete",
        "failure": None,
        "result": {
            "quality": {"bits_per_byte": quality},
            "training": {"history": history},
            "forms": {
                "train": [["delta_rule", "chunked"]],
                "prefill": [["delta_rule", "chunked"]],
                "decode": [["delta_rule", "recurrent"]],
            },
            "serve": serve,
            "train_memory": memory,
            "machine": {"cpu": "Abacus 3"},
            "neighbours": int(name == LONG),
        },
    }


def summary(name, quality, speed, *, memory, missed=()):
    return {
        "candidate": name,
        "seeds": 2,
        "failures": [],
        "quality": quality,
        "quality_deviation": 0.01,
        "width": 96,
        "depth": 4,
        "figures": {
            "parameters": 468000,
            "memory_mb": memory,
            "train_tokens_s": 9000.0 / speed,
            "decode_ms": {"512": speed, "8192": 2 * speed},
            "prefill_tokens_s": {"512": 90.0, "8192": 80.0 / speed},
            "state_mb": {"512": 0.1, "8192": 0.1},
        },
        "meets": not missed,
        "missed": list(missed),
    }


def comparison(**changes):
    names = {"attention": (2.1, 1.5), BEST: (2.0, 0.6), LONG: (1.9, 1.2), "mamba2": (2.2, 0.5)}
    failure = {
        "seed": 0,
        "stage": "train",
        "step": 7,
        "kind": "NumericalError",
        "reason": "nan <b>",
    }
    missed = {"term": "decode_ms<2@8192", "value": 3.0}
    failed = {"candidate": "hgrn2", "seeds": 0, "failures": [failure], "meets": None, "missed": []}
    return {
        "data": {"name": "shakespeare", "fingerprint": "ab" * 32, "bytes": 1115394, "documents": 1},
        "settings": {"contexts": [512, 8192], "equal": ["parameters", "tokens"], "seeds": 2},
        "budget": "decode_ms<2@8192",
        "terms": [
            {
                "metric": "decode_ms",
                "relation": "<",
                "limit": 2.0,
                "context": 8192,
                "text": "decode_ms<2@8192",
            }
        ],
        "machine": {"cpu": "Abacus 3", "versions": {"torch": "2.13"}},
        "roofline": {"flops_per_second": 5e10, "bytes_per_second": 1e10},
        "command": "seqmix compare --data shakespeare --candidates 'a; b'",
        "records": [record(n, seed, q, s) for n, (q, s) in names.items() for seed in (0, 1)]
        + [
            {"candidate": "hgrn2", "seed": 0, "state": "failed", "result": None, "failure": failure}
        ],
        "summaries": [
            *(
                summary(n, q, s, memory=40 * i + 5.0, missed=[missed] if 2 * s >= 2 else [])
                for i, (n, (q, s)) in enumerate(names.items())
            ),
            failed,
        ],
        "recommendation": {"candidate": BEST, "nearest": None, "reason": f"{BEST} is best."},
        "out": "runs/x",
    } | changes


def test_pareto_keeps_what_no_other_beats():
    points = [(1.0, 5.0), (2.0, 3.0), (2.5, 4.0), (3.0, 1.0), (1.0, 6.0), (4.0, 1.0)]
    assert plots.pareto(points) == [0, 1, 3]
    assert plots.pareto([]) == []


def test_page_says_everything():
    text = html.unescape(re.sub(r"<script>.*?</script>", "", render(comparison()), flags=re.DOTALL))
    for wanted in (
        f"{BEST} is best.",
        "Budget: decode_ms<2@8192",
        "misses decode_ms<2@8192 (3)",
        "2.000 ± 0.010",
        "recurrent",
        "Abacus 3",
        "seqmix compare --data shakespeare",
        "speeds are too low: 3x[gated_delta_net], attention",
        "50 GFLOP/s",
    ):
        assert wanted in text
    assert "nan <b>" in text
    assert "nan <b>" not in render(comparison())  # texts are escaped


def test_page_says_when_training_was_short():
    given = comparison()
    assert "0.0062 tokens per parameter" in render(given)
    for one in given["records"]:
        if one["result"]:
            one["result"]["training"]["history"][-1]["tokens"] = 20 * 468000
    assert "tokens per parameter" not in render(given)


def test_page_needs_no_network():
    text = re.sub(r"<script>.*?</script>", "", render(comparison()), flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert "@import" not in text


def test_page_of_failures_alone_has_no_plots_and_no_library():
    given = comparison()
    failed = {
        "records": given["records"][-1:],
        "summaries": given["summaries"][-1:],
        "recommendation": {"candidate": None, "nearest": None, "reason": "See the failures."},
    }
    text = render(given | failed)
    assert "See the failures." in text
    assert len(text) < 20_000


def test_plots_need_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingExtra, match=r"seqmix\[compare\]"):
        page.render_page("x", [page.Section("y", [page.figure({"z": {"data": [], "layout": {}}})])])


# In a browser


def chromium(folder, target, *options):
    """Runs headless Chromium on a page and returns what it printed and its log."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--allow-file-access-from-files", "--enable-logging=stderr", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=20000", *options]
    done = subprocess.run(
        [*command, Path(target).as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(render(comparison()), encoding="utf-8")
    return folder / "report.html"


@pytest.mark.browser
def test_plots_are_drawn_without_errors(report):
    dom, log = chromium(report.parent, report, "--window-size=1200,900", "--dump-dom")
    assert "CONSOLE" not in log, log
    body = re.sub(r"<script>.*?</script>", "", dom, flags=re.DOTALL)
    assert 'data-drawn="3"' in body[:2000]
    assert body.count('class="main-svg"') >= 3
    assert "decode (ms per token) at 8192" in body
    assert "Pareto frontier" in body
    assert f"{BEST} (recommended)" in body


PROBE = """<!doctype html><iframe src="report.html" style="border:0;width:390px;height:800px"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = async () => {
  const page = frame.contentDocument;
  while (!page.documentElement.dataset.drawn) await new Promise(next => setTimeout(next, 50));
  const select = page.querySelector("select");
  const title = () => page.querySelector(".plot .xtitle")?.textContent;
  const before = title();
  select.value = String(select.options.length - 1);
  select.dispatchEvent(new Event("change"));
  await new Promise(next => setTimeout(next, 500));
  const found = { page: page.documentElement.scrollWidth, before, after: title(),
    plots: [...page.querySelectorAll(".plot")].map(p => p.getBoundingClientRect().right) };
  document.body.append(Object.assign(document.createElement("output"), { textContent: JSON.stringify(found) }));
};
</script>"""


@pytest.mark.browser
def test_phone_does_not_scroll_sideways_and_selectors_work(report):
    probe = report.with_name("probe.html")
    probe.write_text(PROBE, encoding="utf-8")
    dom, log = chromium(report.parent, probe, "--window-size=800,900", "--dump-dom")
    assert "CONSOLE" not in log, log
    found = json.loads(html.unescape(re.search(r"<output>(.*?)</output>", dom)[1]))
    assert found["page"] <= 390
    assert max(found["plots"]) <= 390
    assert found["before"] == "decode (ms per token) at 8192"
    assert found["after"] == "parameters"
