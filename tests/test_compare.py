"""compare: what is recorded, what is refused, and that nothing is lost or done twice.

Most tests put `fake_stage.py` in the place of training; two train for real.
"""

import inspect
import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from rich.console import Console

from seqmix.cli import compare as cli_compare
from seqmix.core.errors import BudgetError, DataError, MissingExtra, StudyError, UnknownName
from seqmix.core.files import OutputError
from seqmix.measure import compare as module
from seqmix.measure import study as study_module
from seqmix.measure import trial
from seqmix.measure.compare import compare
from seqmix.measure.study import Key, Study, describe_storage

FAKE = Path(__file__).with_name("fake_stage.py")
SMALL = {"width": 32, "depth": 1, "length": 16, "parameters": 80_000, "progress": False}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 100)
    return path


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Fake stages, and a function that gives how often each (stage, layout, seed) was started."""
    log = tmp_path / "started.log"
    log.touch()
    monkeypatch.setenv("FAKE_STAGE_LOG", str(log))
    monkeypatch.setattr(trial, "stage_command", fake_command)
    return lambda: Counter(log.read_text().splitlines())


def fake_command(stage, folder):
    return [sys.executable, "-S", str(FAKE), stage, str(folder)]


def command(text, candidates, out, *, patch="", **options):
    """The same call in a process of its own, with fake stages and `patch` before it."""
    code = f"""
        import sys
        sys.path.insert(0, {str(FAKE.parent)!r})
        from test_compare import fake_command
        from seqmix.measure import compare, study, trial
        trial.stage_command = fake_command
    """
    call = (
        f"compare.compare({str(text)!r}, {candidates!r}, out={str(out)!r}, **{SMALL | options!r})"
    )
    return [sys.executable, "-c", "\n".join([textwrap.dedent(code), textwrap.dedent(patch), call])]


def test_failures_are_recorded_and_the_study_goes_on(tmp_path, text, started):
    names = ["retention", "hgrn2", "delta_net", "linear_attention", "3x[gated_delta_net], mamba2"]
    found = compare(
        text, "; ".join(names), budget="decode_ms<3@8192", out=tmp_path / "out", seeds=2, **SMALL
    )
    failures = {r["candidate"]: r["failure"] for r in found.records if r["state"] == "failed"}
    assert failures["retention"]["step"] == 7
    assert "loss at step 7 is nan" in failures["retention"]["reason"]
    assert "killed by signal 9: most likely out of memory" in failures["hgrn2"]["reason"]
    assert "ended with code 1: the kernel is missing" in failures["delta_net"]["reason"]
    assert started()["train linear_attention 1"] == 1

    assert found.recommendation["candidate"] == "linear_attention"
    assert [row["meets"] for row in found.summaries] == [None, None, None, True, False]
    assert found.summaries[3]["quality"] == pytest.approx(2.2005)
    assert found.summaries[3]["quality_deviation"] == pytest.approx(0.000707, rel=1e-3)
    assert found.settings["contexts"] == [512, 2048, 8192]
    assert json.loads(found.to_json())["records"] == found.records
    assert json.loads((tmp_path / "out/comparison.json").read_text()) == json.loads(found.to_json())
    assert found.report.read_text().startswith("<!doctype html>")

    console = Console(width=100, file=io.StringIO())
    console.print(found.table())
    shown = console.file.getvalue()
    assert "* linear_attention" in shown
    assert "retention, seed 1: The loss at step 7 is nan." in shown


def test_the_same_command_trains_nothing_twice(tmp_path, text, started):
    out, names = tmp_path / "out", "linear_attention; retention"
    compare(text, names, out=out, **SMALL)
    before = started()
    again = compare(text, names, budget="memory_mb<1", out=out, **SMALL)
    assert started() == before
    assert again.recommendation["candidate"] is None
    assert again.recommendation["nearest"] == "linear_attention"
    assert "No candidate meets the budget memory_mb<1" in again.report.read_text().replace(
        "&lt;", "<"
    )
    compare(text, names, contexts=[512], out=out, **SMALL)  # fewer contexts than were measured
    assert started() == before
    out = out.rename(tmp_path / "moved")
    compare(text, names, out=out, **SMALL)
    assert started() == before
    compare(text, names, out=out, retry_failed=True, **SMALL)
    assert started() - before == Counter({"train retention 0": 1})


def test_the_command_of_the_report_is_the_same_comparison(tmp_path, text, started):
    found = compare(text, "linear_attention", out=tmp_path / "out", **SMALL)
    words = shlex.split(found.command)
    assert words[:2] == ["seqmix", "compare"]
    given = {k[2:].replace("-", "_"): v for k, v in zip(words[2::2], words[3::2], strict=True)}
    assert set(given) <= set(inspect.signature(cli_compare.run).parameters)
    numbers = {k: v for k, v in given.items() if k not in ("learning_rate", "contexts")}
    again = {k: int(v) if v.isdecimal() else v for k, v in numbers.items()}
    compare(**again, learning_rate=float(given["learning_rate"]), progress=False)
    assert started()["train linear_attention 0"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 17}, "settings.length: 16 in the study, 17 in this command"),
        ({"contexts": [512, 4096]}, r"settings.contexts: \[512, 2048, 8192\] in the study"),
        ({"seeds": 2}, "settings.seeds: 1 in the study"),
        ({"equal": "seconds"}, "settings.equal: .*'tokens'.* in the study, .*'seconds'.* in this"),
    ],
)
def test_other_settings_are_refused(tmp_path, text, started, change, message):
    out = tmp_path / "out"
    compare(text, "linear_attention", out=out, **SMALL)
    with pytest.raises(StudyError, match=message) as caught:
        compare(text, "linear_attention", out=out, **SMALL | change)
    assert "Choose another --out" in str(caught.value)
    compare(text, "linear_attention", out=out, **SMALL)
    assert started()["train linear_attention 0"] == 1


def test_other_machine_version_or_data_is_refused(tmp_path, text, started, monkeypatch):
    out = tmp_path / "out"
    compare(text, "linear_attention", out=out, **SMALL)
    here = module.machine.describe()
    with monkeypatch.context() as patched:
        patched.setattr(module.machine, "describe", lambda: here | {"cpu": "Abacus 3"})
        with pytest.raises(StudyError, match=r"machine.cpu: .* Abacus 3 in this command") as caught:
            compare(text, "linear_attention", out=out, **SMALL)
        assert "--allow-other-machine" in str(caught.value)
        compare(text, "linear_attention", out=out, allow_other_machine=True, **SMALL)
    with monkeypatch.context() as patched:
        versions = here["versions"] | {"seqmix": "99"}
        patched.setattr(module.machine, "describe", lambda: here | {"versions": versions})
        with pytest.raises(StudyError, match=r"versions.seqmix: .* 99 in this command"):
            compare(text, "linear_attention", out=out, **SMALL)
    with text.open("a") as file:
        file.write("one more line\n")
    with pytest.raises(StudyError, match=r"data.fingerprint"):
        compare(text, "linear_attention", out=out, **SMALL)


def test_mistakes_are_found_before_anything_is_made(tmp_path, text, started, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(UnknownName, match="Did you mean mamba2"):
        compare(text, "linear_attention; mambo2", out=out, **SMALL)
    with pytest.raises(BudgetError):
        compare(text, "linear_attention", budget="decode<1", out=out, **SMALL)
    with pytest.raises(DataError, match="Give a longer text"):
        compare(text, "linear_attention", out=out, **SMALL | {"length": 10_000})
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "optuna", None)
        with pytest.raises(MissingExtra, match=r"seqmix\[compare\]"):
            compare(text, "linear_attention", out=out, **SMALL)
    assert not out.exists()


def test_an_error_that_every_trial_would_meet_ends_the_comparison(tmp_path, text, started):
    with pytest.raises(DataError, match="The data is unusable"):
        compare(text, "linear_attention; s4d; mamba2", out=tmp_path / "out", **SMALL)
    assert "train mamba2 0" not in started()


def test_interrupting_leaves_the_trial_for_the_next_command(tmp_path, text, started, monkeypatch):
    def interrupt(self, activity):
        if "measuring" in activity:
            raise KeyboardInterrupt

    names = "linear_attention; mamba2"
    with monkeypatch.context() as patched:
        patched.setattr(module.Progress, "show", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare(text, names, out=tmp_path / "out", **SMALL)
    found = compare(text, names, out=tmp_path / "out", **SMALL)
    assert {record["state"] for record in found.records} == {"complete"}
    assert started()["train linear_attention 0"] == 1  # its result was there already


def test_the_folder_of_somebody_else_is_left_alone(tmp_path, text, started):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="not a comparison's"):
        compare(text, "linear_attention", out=tmp_path / "mine", **SMALL)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputError, match="cannot be used"):
        compare(text, "linear_attention", out=text / "below-a-file", **SMALL)


def manifest(candidates=("a", "b"), seeds=1):
    return {"settings": {"candidates": list(candidates), "seeds": seeds, "contexts": [1]}}


def test_a_full_disk_and_a_damaged_study_are_explained(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OutputError, match=r"Cannot write the study at .*Free some space"):
            Study(tmp_path / "full.sqlite3", "name", manifest())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (tmp_path / "damaged.sqlite3").write_text("no database at all, only text " * 40)
    with pytest.raises(StudyError, match=r"damaged.sqlite3 cannot be used: .*not a database"):
        Study(tmp_path / "damaged.sqlite3", "name", manifest())
    hidden = describe_storage("postgresql://ann:secret@host/db")
    assert hidden == "postgresql://ann:***@host/db"


def test_a_trial_of_a_dead_process_is_run_again(tmp_path, monkeypatch):
    study = Study(tmp_path / "study.sqlite3", "name", manifest())
    study.enqueue_missing()
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process = study_module.this_process() | {"pid": gone.pid}
    gone.wait()
    with monkeypatch.context() as patched:
        patched.setattr(study_module, "this_process", lambda: process)
        dead = study.claim()
    alive = study.claim()
    assert (dead.key, alive.key) == (Key("a", 0), Key("b", 0))
    assert study.claim() is None
    study.enqueue_missing()
    assert [o["state"] for o in study.outcomes().values()] == ["waiting", "running"]
    assert study.claim().key == dead.key


def test_a_silent_process_on_another_machine_counts_as_dead(tmp_path, monkeypatch):
    study = Study(tmp_path / "study.sqlite3", "name", manifest("a"))
    study.enqueue_missing()
    elsewhere = study_module.this_process() | {"host": "elsewhere"}
    with monkeypatch.context() as patched:
        patched.setattr(study_module, "this_process", lambda: elsewhere)
        claim = study.claim()
    claim.beat()
    study.enqueue_missing()
    assert study.outcomes()[claim.key]["state"] == "running"
    now = study_module.time.time()
    monkeypatch.setattr(study_module.time, "time", lambda: now + study_module.SILENCE + 1)
    study.enqueue_missing()
    assert study.outcomes()[claim.key]["state"] == "waiting"


def test_work_enqueued_twice_is_done_once(tmp_path):
    study = Study(tmp_path / "study.sqlite3", "name", manifest("a"))
    study.enqueue_missing()
    study._study.enqueue_trial(  # what a second process does that looked at the same moment
        {"candidate": "a", "seed": 0}, user_attrs={"candidate": "a", "seed": 0}
    )
    claim = study.claim()
    assert claim.key == Key("a", 0)
    assert study.claim() is None
    claim.complete({"x": 1}, [1.0, 2.0, 3.0])
    assert study.outcomes() == {
        Key("a", 0): {"state": "complete", "result": {"x": 1}, "failure": None}
    }
    study.enqueue_missing()
    assert study.claim() is None


def test_several_processes_share_the_work(tmp_path, text, started):
    names = "linear_attention; mamba2; gated_linear_attention; gated_delta_net"
    workers = [subprocess.Popen(command(text, names, tmp_path / "out")) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert len(started()) == 2 * 4
    assert set(started().values()) == {1}
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert {record["state"] for record in found["records"]} == {"complete"}


def test_kill_loses_only_the_running_trial(tmp_path, text, started, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setenv("FAKE_STAGE_PIPE", str(pipe))
    names = "linear_attention; hyena; mamba2"
    worker = subprocess.Popen(command(text, names, tmp_path / "out"))
    assert int(pipe.read_text()) > 0  # blocks until the second trial runs
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    pipe.unlink()
    found = compare(text, names, out=tmp_path / "out", **SMALL)
    assert {record["state"] for record in found.records} == {"complete"}
    trained = {key: n for key, n in started().items() if key.startswith("train")}
    assert trained == {"train linear_attention 0": 1, "train hyena 0": 2, "train mamba2 0": 1}


def test_a_stage_ends_with_its_parent():
    code = (
        "import threading\nfrom seqmix.measure.trial import _end_with_parent\n"
        "_end_with_parent()\nprint('up', flush=True)\nthreading.Event().wait()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        assert child.stdout.readline() == b"up\n"
        child.stdin.close()
        assert child.wait(timeout=60) == 1


def test_a_full_disk_in_a_trial_is_told_apart():
    assert trial._explain(OSError(28, "No space left on device"))["kind"] == "OutputError"


def test_out_of_memory_is_told_apart():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    for error in (caught.value, MemoryError()):
        found = trial._explain(error)
        assert found["kind"] == "MemoryError"
        assert "out of memory" in found["reason"]


# For real

REAL = {
    "width": 32,
    "heads": 2,
    "depth": 1,
    "length": 32,
    "batch": 2,
    "tokens": 640,
    "equal": "width",
    "contexts": [40, 80],
    "parameters": None,
}


def test_real_comparison_survives_kill(tmp_path, text):
    """Killed once after the first trial; then the same command finishes the second alone."""
    patch = """
        trial.stage_command = lambda stage, folder: [
            sys.executable, "-m", "seqmix.measure.trial", stage, str(folder)]
        complete = study.Claim.complete
        def complete_and_say(self, *values):
            complete(self, *values)
            print("complete", flush=True)
        study.Claim.complete = complete_and_say
    """
    names = "gated_linear_attention; mamba2"
    run = command(text, names, tmp_path / "out", patch=patch, **REAL)
    with subprocess.Popen(run, stdout=subprocess.PIPE) as worker:
        assert worker.stdout.readline() == b"complete\n"
        worker.send_signal(signal.SIGKILL)
    results = list(tmp_path.glob("out/trials/*/serve.json"))
    assert len(results) == 1
    stamp = results[0].stat().st_mtime_ns
    found = compare(text, names, out=tmp_path / "out", **SMALL | REAL)
    assert results[0].stat().st_mtime_ns == stamp
    assert [record["state"] for record in found.records] == ["complete", "complete"]
    for record in found.records:
        result = record["result"]
        assert result["training"]["tokens"] == 640
        assert len(result["training"]["history"]) == 10
        assert 0 < result["quality"]["bits_per_byte"] < 16
        assert result["serve"]["memory"]["memory_mb"] > 0
        assert list(result["serve"]["decode_ms"]) == ["40", "80"]
        assert result["forms"]["decode"]
    assert found.recommendation["candidate"] in names.split("; ")


def test_no_trial_is_handed_out_twice(tmp_path):
    manifest = {"settings": {"seeds": 2, "candidates": [f"c{i}" for i in range(10)]}}
    studies = [Study(tmp_path / "study.db", "s", manifest) for _ in range(4)]
    studies[0].enqueue_missing()

    def take(study):
        return [claim.key for claim in iter(study.claim, None)]

    with ThreadPoolExecutor(len(studies)) as pool:
        taken = [key for keys in pool.map(take, studies) for key in keys]
    assert sorted(map(astuple, taken)) == sorted(map(astuple, studies[0].keys))
