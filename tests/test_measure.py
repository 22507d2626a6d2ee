"""Timing, memory, speed, budgets, candidates of equal size, and what is recommended."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqmix.core.cost import Cost
from seqmix.core.errors import BudgetError, ConfigError, LayoutError, RangeError, UnknownName
from seqmix.measure import machine, speed, timing
from seqmix.measure.budget import METRICS, RELATIONS, Term, contexts_of, parse_budget
from seqmix.measure.candidates import build_candidates, split_candidates
from seqmix.measure.recommend import recommend, summarise
from seqmix.measure.roofline import Roofline, calibrate
from seqmix.measure.settings import check_effort, parse_equal, preset_with
from seqmix.models.backbone import LanguageModel, ModelSpec
from seqmix.models.layout import parse_layout

ROOFLINE = Roofline(flops_per_second=1e9, bytes_per_second=1e9)


def test_quartiles_of_known_samples():
    found = timing.summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.low, found.median, found.high, found.repeats) == (2.0, 3.0, 4.0, 5)
    assert timing.summarise([7.0]) == timing.Timing(7.0, 7.0, 7.0, 1)
    rate = found.per(12.0)
    assert (rate.low, rate.median, rate.high) == (
        3.0,
        4.0,
        6.0,
    )  # the slow quartile is the low rate
    with pytest.raises(RangeError, match="no samples"):
        timing.summarise([])


def test_time_calls_warms_up_and_stops(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    calls = []
    found = timing.time_calls(lambda: calls.append(1), seconds=0.0, warmup=2, minimum=3)
    assert len(calls) == 5
    assert found == timing.Timing(1.0, 1.0, 1.0, 3)
    found = timing.time_calls(lambda: calls.append(1), seconds=1e9, minimum=1, maximum=4)
    assert found.repeats == 4


def test_roofline_takes_the_slower_of_computing_and_moving():
    assert ROOFLINE.seconds(Cost(flops=2e9, bytes=1e9)) == 2.0
    assert ROOFLINE.seconds(Cost(flops=1e9, bytes=3e9)) == 3.0
    found = calibrate(size=64, megabytes=1, seconds=0.0)
    assert found.flops_per_second > 0
    assert found.bytes_per_second > 0


def test_peak_memory_sees_what_was_freed_and_not_the_parent():
    ballast = bytearray(300 * 2**20)  # a fat parent must not show in the child's peak
    code = (
        "from seqmix.measure.memory import PeakMemory\nimport json\n"
        "with PeakMemory() as empty: pass\n"
        "with PeakMemory() as m: data = bytearray(b'x') * (64 * 2**20); del data\n"
        "print(json.dumps([empty.to_dict(), m.to_dict()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    empty, full = json.loads(done.stdout)
    assert len(ballast)
    assert empty["memory_mb"] < 8
    assert 60 < full["memory_mb"] < 80
    assert full["peak_mb"] < 300
    assert full["peak_mb"] == pytest.approx(full["baseline_mb"] + full["memory_mb"])


def test_machine_is_plain_and_tells_what_has_to_agree():
    found = machine.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(machine.identity(found)) == set(machine.IDENTITY)
    assert found["cores"] >= 1


@pytest.mark.parametrize("layout", ["gated_linear_attention", "gated_delta_net", "mamba2"])
def test_speed_has_every_figure_beside_its_prediction(layout):
    model = LanguageModel(ModelSpec(layout=layout, width=32, heads=2, vocabulary=17))
    found = speed.inference_speed(model, [5, 12], roofline=ROOFLINE, seconds=0.0, tokens=3, chunk=8)
    for metric in ("prefill_tokens_s", "decode_ms"):
        assert list(found[metric]) == ["5", "12"]
        for figure in found[metric].values():
            assert 0 < figure["low"] <= figure["median"] <= figure["high"]
            assert figure["repeats"] >= 2
            assert figure["predicted"] > 0
    for figure in found["state_bytes"].values():
        assert figure["measured"] == figure["predicted"] > 0
    assert (
        {operator for operator, _ in found["forms"]["prefill"]}
        >= {operator for operator, _ in found["forms"]["decode"]}
        != set()
    )
    before = [p.clone() for p in model.parameters()]
    trained = speed.training_speed(model, length=6, batch=2, seconds=0.0)
    assert trained.repeats >= 3
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert speed.predicted_training_speed(model, length=6, batch=2, roofline=ROOFLINE) > 0


def test_prefill_in_chunks_gives_the_state_of_one_pass():
    model = LanguageModel(ModelSpec(layout="gated_linear_attention", width=32, vocabulary=17))
    ids = torch.arange(11)[None] % 17
    with torch.no_grad():
        _, wanted = model(ids)
        got = speed.prefill(model, ids, chunk=4)
    torch.testing.assert_close(got[0]["recurrent"], wanted[0]["recurrent"])


# Budgets


def test_budget_of_the_readme():
    terms = parse_budget(" decode_ms<2@8192,memory_mb <= 400 , prefill_tokens_s>1e3@2048 ")
    assert terms == (
        Term("decode_ms", "<", 2.0, 8192),
        Term("memory_mb", "<=", 400.0),
        Term("prefill_tokens_s", ">", 1000.0, 2048),
    )
    assert contexts_of(terms) == [2048, 8192]
    assert parse_budget(None) == parse_budget("  ") == ()


@given(
    st.lists(
        st.builds(
            Term,
            st.sampled_from(sorted(METRICS)),
            st.sampled_from(sorted(RELATIONS)),
            st.integers(0, 10**6).map(float),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_budgets_survive_writing_and_reading(terms):
    assert parse_budget(", ".join(map(str, terms))) == tuple(terms)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("decode_m<2", 1, "Did you mean decode_ms?"),
        ("decode_ms=2", 10, "expected one of < <= > >= after decode_ms"),
        ("decode_ms<fast", 11, "expected a number"),
        ("memory_mb<400@8192", 14, "memory_mb has no context"),
        ("decode_ms<2@", 13, "expected a context in tokens"),
        ("decode_ms<2@0", 14, "expected a context in tokens"),
        ("decode_ms<2, ", 14, "expected the name of a metric"),
        ("decode_ms<2 memory_mb<3", 13, "expected ',' or the end"),
    ],
)
def test_budget_errors_point_at_the_fault(text, column, message):
    with pytest.raises(BudgetError) as caught:
        parse_budget(text)
    lines = str(caught.value).splitlines()
    assert f"column {column}:" in lines[0]
    assert message in lines[0]
    assert lines[1] == "  " + text
    assert lines[2] == " " * (column + 1) + "^"
    assert all(metric in str(caught.value) for metric in METRICS)


# Candidates


def test_candidates_are_layouts():
    text = "gated_linear_attention;  3x[mamba2],\n retention ; "
    assert split_candidates(text) == ["gated_linear_attention", "3x[mamba2], retention"]
    assert split_candidates(["mamba2"]) == ["mamba2"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("gated_linear_atention", UnknownName, "Did you mean .*gated_linear_attention"),
        ("mamba2/gluu", UnknownName, "Candidate 'mamba2/gluu': There is no channel"),
        ("mamba2; 3x[mamba2", LayoutError, r"column 10(.|\n)*\^"),
        (" ; ", LayoutError, "no candidates"),
        ("mamba2; mamba2", LayoutError, "given twice"),
    ],
)
def test_wrong_candidates_are_refused(text, error, message):
    with pytest.raises(error, match=message):
        split_candidates(text)


def test_equal_parameters():
    layouts = ["gated_linear_attention", "mamba2", "3x[gated_delta_net], retention", "mamba2/none"]
    built = build_candidates(layouts, width=64, depth=4, vocabulary=258, parameters=300_000)
    for candidate in built[:3]:
        assert abs(candidate.parameters / 300_000 - 1) < 0.02
    # Without a channel mixer of its own only the width is left, in steps of 8 per head.
    assert abs(built[3].parameters / 300_000 - 1) < 0.35
    for candidate in built:
        assert candidate.spec.width % 32 == 0
        made = LanguageModel(candidate.spec)
        assert made.num_parameters() == candidate.parameters
    with pytest.raises(ConfigError, match="smallest width"):
        build_candidates(["mamba2"], width=64, depth=4, parameters=1000)


def test_equal_width_and_whole_layouts():
    long = "2x[mamba2], 3x[retention]"
    (one, other) = build_candidates(["mamba2", long], width=32, depth=4)
    assert one.spec.width == other.spec.width == 32
    assert len(one.spec.entries()) == 4
    assert other.spec.entries() == parse_layout(long)


def test_equal_reads_size_and_effort():
    assert parse_equal("tokens") == ("parameters", "tokens")
    assert parse_equal("seconds, width") == ("width", "seconds")
    with pytest.raises(ConfigError, match="Did you mean tokens"):
        parse_equal("token")
    with pytest.raises(ConfigError, match="two of one kind"):
        parse_equal("tokens, seconds")
    with pytest.raises(ConfigError, match="seconds=5 has no effect"):
        check_effort("parameters", "tokens", tokens=None, seconds=5, parameters=None)
    with pytest.raises(ConfigError, match="parameters=9 has no effect"):
        check_effort("width", "tokens", tokens=None, seconds=None, parameters=9)
    with pytest.raises(RangeError, match="batch=0"):
        preset_with("quick", {"batch": 0})
    with pytest.raises(RangeError, match="contexts"):
        preset_with("quick", {"contexts": [0, 8]})


# Recommendations


def _record(candidate, quality, decode, seed=0):
    memory = {"memory_mb": 100.0}
    return {
        "candidate": candidate,
        "seed": seed,
        "state": "complete",
        "result": {
            "spec": {"width": 8, "depth": 2},
            "quality": {"bits_per_byte": quality, "perplexity": 4.0, "loss": 1.4},
            "training": {"seconds": 9.0},
            "train_memory": memory,
            "serve": {
                "parameters": 10,
                "memory": memory,
                "state_bytes": {"64": {"measured": 2**20}},
                "decode_ms": {"64": {"median": decode}},
                "prefill_tokens_s": {"64": {"median": 1.0}},
                "train_tokens_s": {"median": 1.0},
            },
        },
    }


def _recommend(records, budget):
    terms = parse_budget(budget)
    names = dict.fromkeys(record["candidate"] for record in records)
    rows = [summarise(n, [r for r in records if r["candidate"] == n], terms) for n in names]
    return rows, recommend(rows, terms)


def test_the_best_that_meets_the_budget_is_recommended():
    records = [_record("a", 1.0, 9.0), _record("b", 1.5, 2.0), _record("c", 1.7, 1.0)]
    rows, found = _recommend(records, "decode_ms<3, state_mb<=1@64")
    assert found["candidate"] == "b"
    assert found["runner_up"] == "c"
    assert "2 of 3 candidates" in found["reason"]
    assert "0.200 more" in found["reason"]
    assert rows[0]["missed"] == [{"term": "decode_ms<3", "value": 9.0}]
    assert _recommend(records, None)[1]["candidate"] == "a"


def test_where_none_meets_the_budget_the_nearest_is_named():
    records = [_record("a", 1.0, 9.0), _record("b", 1.5, 4.0)]
    _, found = _recommend(records, "decode_ms<2")
    assert found["candidate"] is None
    assert found["nearest"] == "b"
    assert "No candidate meets" in found["reason"]
    assert "decode_ms<2 with 4" in found["reason"]


def test_the_margin_is_compared_with_the_spread_over_seeds():
    far = [_record("a", q, 1.0, s) for s, q in enumerate((1.00, 1.02))]
    near = [_record("b", q, 1.0, s) for s, q in enumerate((1.03, 1.05))]
    off = [_record("c", q, 1.0, s) for s, q in enumerate((2.00, 2.02))]
    assert "may be chance" in _recommend(far + near, None)[1]["reason"]
    assert "the order is clear" in _recommend(far + off, None)[1]["reason"]


def test_failures_do_not_hide():
    failure = {"stage": "train", "kind": "NumericalError", "reason": "nan", "step": 3}
    failed = {"candidate": "a", "seed": 0, "state": "failed", "failure": failure}
    rows, found = _recommend([failed], "decode_ms<2")
    assert rows[0]["failures"] == [{"seed": 0, **failure}]
    assert found["candidate"] is None
    assert "No candidate was trained" in found["reason"]
