"""`seqmix bench`: only right forms get times, a stopped run goes on, and every speed to reach is measured."""

import importlib.util
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from seqmix.cli import main
from seqmix.cli._pages import write_page
from seqmix.cli.bench import disagreement as against_definition
from seqmix.core.errors import SeqmixError, UnknownName
from seqmix.measure import benchmark, curves, peers, ratios
from seqmix.measure.bench import time_case
from seqmix.measure.benchmark import Choice, measure_table
from seqmix.measure.calls import DTYPES, call, disagreement, draw, exactly
from seqmix.measure.floors import FLOORS, Floor, measure_floor, summarise
from seqmix.measure.kept import Kept
from seqmix.measure.roofs import Settings, limits, measure_roofs
from seqmix.measure.timing import time_in_turn
from seqmix.ops import OPERATORS, Case
from seqmix.ops._operator import Form
from seqmix.report.bench import cells, floor_cells, render
from seqmix.testing.operators import installed

ROOT = Path(__file__).parents[1]
TINY = Settings(seconds=0.0, shrink=64, matmul_size=32)
table = partial(time_case, dtype="float32", seconds=0.0, matmul_size=32)


def small(name):
    operator = OPERATORS.get(name)
    return replace(operator, timing=[replace(operator.cases[0], name="small")])


def right(form):
    return None


def test_every_form_gets_times_rates_and_ratios():
    operator = small("short_convolution")
    with installed(operator):
        rows = table(operator, operator.timing[0], wrong=right)
    forms = list(operator.forms)
    passes = ["forward"] * len(forms) + ["forward and backward"] * len(forms)
    assert [(row["form"], row["pass"]) for row in rows] == list(zip(forms * 2, passes, strict=True))
    assert rows[0]["ratio"] == 1.0
    assert rows[1]["ratio"] == pytest.approx(rows[1]["median_ms"] / rows[0]["median_ms"])
    flops = operator.cost(operator.timing[0]).flops
    for row in rows:
        times = 1 if row["pass"] == "forward" else 3
        assert row["gflops"] == pytest.approx(times * flops / row["median_ms"] / 1e6)
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["of_matmul"] > 0


def test_a_form_that_disagrees_with_the_definition_gets_no_time():
    operator = small("short_convolution")

    def off_by_a_little(*inputs):
        return operator.forms["conv1d"].run(*inputs) * 1.001

    broken = replace(operator, forms={**operator.forms, "conv1d": Form(off_by_a_little)})
    with installed(broken):
        rows = table(broken, broken.timing[0], wrong=partial(against_definition, broken))
    wrong = [row for row in rows if row["form"] == "conv1d"]
    assert all("disagrees with the definition" in row["skipped"] for row in wrong)
    assert all("median_ms" not in row for row in wrong)
    assert any("median_ms" in row for row in rows)


def test_a_form_that_is_wrong_only_on_the_timed_inputs_gets_no_time():
    operator = small("short_convolution")
    longest = operator.timing[0]["T"]

    def wrong_when_long(extended, weight):
        output = operator.forms["conv1d"].run(extended, weight)
        return output * 2 if output.shape[1] >= longest else output

    broken = replace(operator, forms={**operator.forms, "conv1d": Form(wrong_when_long)})
    with installed(broken):
        rows = table(broken, broken.timing[0], wrong=right)
    wrong = [row for row in rows if row["form"] == "conv1d"]
    assert all("wrong on the timed inputs: output off by 1" in row["skipped"] for row in wrong)
    assert cells(wrong[0])[-1] == wrong[0]["skipped"]
    assert any("median_ms" in row for row in rows)


def test_a_form_that_cannot_run_or_has_no_backward_says_so():
    operator = OPERATORS.get("linear_attention")
    rows = table(operator, operator.cases[0].at("long", T=40), wrong=right)
    skipped = [row for row in rows if row["form"] == "recurrent"]
    assert all("40 tokens" in row["skipped"] for row in skipped)
    form = replace(operator.forms["chunked"], trains=False)
    operator = replace(operator, forms={"chunked": form})
    rows = table(operator, operator.cases[0], wrong=right)
    assert "median_ms" in rows[0]
    assert rows[1]["skipped"] == "has no backward"


@pytest.mark.parametrize("name", OPERATORS.names())
def test_bfloat16_changes_data_and_leaves_gates_and_states(name):
    operator = OPERATORS.get(name)
    for case in operator.cases[:3]:
        inputs = draw(operator, case, torch.bfloat16)
        dtypes = {n: v.dtype for n, v in inputs.items() if isinstance(v, torch.Tensor)}
        assert torch.bfloat16 in dtypes.values()
        kept = {"g", "beta", "dt", "A", "D", "initial_state", "dt_bias", "delta_bias"}
        assert all(dtypes[n] == torch.float32 for n in kept & set(dtypes))


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda p: f"{p.operator}-{p.name}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_peer_computes_the_same_and_trains(peer, dtype):
    if reason := peer.missing():
        pytest.skip(reason)
    operator = OPERATORS.get(peer.operator)
    case = next(c for c in operator.timing if c.name == peer.case)
    inputs = draw(operator, curves.at_length(case, 37), DTYPES[dtype])
    inputs.pop("initial_state", None)
    made = peer.call(inputs)
    if peer.same:
        assert disagreement(made, exactly(operator, inputs), DTYPES[dtype], gradients=False) is None
    else:
        assert made.run().shape == call(operator, inputs).run().shape
    assert all(g is not None for g in made.differentiate(made.cotangent()))


def test_a_peer_that_is_not_installed_is_left_out():
    peer = replace(peers.PEERS[0], module="no_such_package.inside")
    assert peer.missing() == "no_such_package is not installed"
    assert "has no" in replace(peers.PEERS[0], function="no_such_function").missing()


def test_curves_have_time_and_memory_and_leave_out_what_is_wrong():
    operator = OPERATORS.get("diagonal_scan")
    found = curves.measure_case(
        operator,
        operator.timing[0],
        "float32",
        "forward",
        [4, 256, 4096],
        seconds=0.0,
        wrong=lambda form: "it is" if form == "native" else None,
        threads=1,
        longest=float("inf"),
    )
    by_name = {curve["name"]: curve for curve in found}
    assert by_name["seqmix native"]["skipped"] == "disagrees with the definition: it is"
    short, middle, long = by_name["seqmix chunked"]["points"]
    assert [point["length"] for point in (short, middle, long)] == [4, 256, 4096]
    inputs = 4 * 4096 * operator.timing[0]["D"]  # bytes of one of them
    assert inputs < long["bytes"] < 20 * inputs
    assert short["bytes"] < long["bytes"] / 10
    assert len(by_name["seqmix recurrent"]["points"]) == 1
    assert "256 tokens" in by_name["seqmix recurrent"]["ended"]
    record = {**RECORD, "curves": found}
    text = render(record)
    assert "Memory against length" in text
    assert "disagrees with the definition: it is" in text


RECORD = {
    "machine": {
        "cpu": "a <fast> one",
        "threads": 1,
        "instruction_set": "v9",
        "versions": {"torch": "2"},
        "commit": "abc",
    },
    "date": "2000-01-01",
    "settings": {"seconds": 1},
    "roofs": {"flops_per_second": 1e9, "bytes_per_second": 1e9, "exponentials_per_second": 1e9},
    "rows": [
        {"operator": "o", "case": "c", "form": "f", "pass": "forward", "dtype": "float32"}
        | {"skipped": "a & b"}
    ],
    "curves": [],
}


def test_page_without_curves_is_self_contained():
    text = render(RECORD)
    assert "a &lt;fast&gt; one" in text
    assert "a &amp; b" in text
    assert "http" not in text


def test_a_curve_ends_before_a_call_that_could_take_too_long():
    operator = OPERATORS.get("diagonal_scan")
    job = {"operator": operator.name, "case": operator.timing[0].name, "dtype": "float32"}
    job |= {"pass": "forward", "names": ["seqmix chunked"], "lengths": [8, 16], "threads": 1}
    found = curves._measure_memory(job | {"longest": 1e-9}, "seqmix chunked")
    assert list(found["bytes"]) == [8]
    assert "length 8 could take more than 0 s" in found["ended"]


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    choice = Choice(
        operators=["diagonal_scan"],
        dtypes=["float32"],
        lengths=[],
        seconds=0.0,
        matmul_size=32,
        shrink=64,
    )
    timed = []

    def stop_at_second(operator, case, *arguments, **options):
        timed.append(case.name)
        if len(timed) == 2:
            raise KeyboardInterrupt
        return [{"case": case.name}]

    monkeypatch.setattr(benchmark, "time_case", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        measure_table(choice, out=tmp_path, wrong=lambda operator, form: None)
    assert not (tmp_path / "bench.json").exists()
    record = measure_table(choice, out=tmp_path, wrong=lambda operator, form: None)
    cases = [case.name for case in OPERATORS.get("diagonal_scan").timing]
    assert timed == [*cases[:2], *cases[1:]]
    assert [row["case"] for row in record["rows"]] == cases
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == record["rows"]
    assert not list(tmp_path.glob(".*partial*"))


def test_another_choice_or_a_damaged_memory_starts_again(tmp_path):
    path = tmp_path / "memory.json"
    assert Kept(path, {"seconds": 1})("a", lambda: 1) == 1
    assert Kept(path, {"seconds": 1})("a", lambda: 2) == 1
    assert Kept(path, {"seconds": 2})("a", lambda: 3) == 3
    path.write_text("{")
    assert Kept(path, {"seconds": 2})("a", lambda: 4) == 4


@pytest.mark.parametrize("wrong", [{"operators": ["linear"]}, {"dtypes": ["float8"]}])
def test_an_unknown_choice_is_refused(wrong):
    with pytest.raises(UnknownName):
        Choice(**wrong)


@pytest.mark.parametrize("wrong", [{"forms": ["fast"]}, {"cases": ["large"]}])
def test_a_form_or_case_that_no_chosen_operator_has_is_refused(wrong):
    with pytest.raises(UnknownName, match="Known"):
        Choice(operators=["diagonal_scan"], **wrong)


def test_functions_take_turns_and_get_the_same_time():
    order = []
    timings = time_in_turn(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0, rounds=4
    )
    assert order == ["a", "b"] * 4
    assert timings["a"].repeats == 3


KINDS = {
    "product": [f for f in FLOORS if f.measure.func is ratios.against_product][:1],
    "peer": [f for f in FLOORS if f.against.startswith("transformers")][:1],
    "bfloat16": [f for f in FLOORS if f.dtype == "bfloat16"][:1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_floor_is_measured_at_every_size(kind):
    for floor in KINDS[kind]:
        rows = measure_floor(floor, TINY)
        assert rows
        assert all(row["ratio"] > 0 and row["times"]["ours"]["median_ms"] > 0 for row in rows)
        assert len({json.dumps(row["sizes"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("against", ["dense", "BSR"])
def test_block_sparse_products_are_measured(against):
    rows = ratios.sparse_product(TINY, against=against)
    assert all(row["ratio"] > 0 for row in rows)
    assert rows[0]["sizes"]["tokens"] == 16


def test_whole_models_are_measured_where_there_is_acceleration():
    (floor,) = [f for f in FLOORS if f.what.startswith("Mamba, whole model, decoding")]
    (row,) = measure_floor(floor, TINY)
    if importlib.util.find_spec("seqmix.measure.hybrids") is None:
        assert "is not in this version" in row["skipped"]
    else:
        assert row["ratio"] > 0
        assert row["tokens_per_second"] > 0
        assert row["work"]["bytes"] > 0


def test_every_floor_has_its_own_name():
    names = [(floor.what, floor.against) for floor in FLOORS]
    assert len(set(names)) == len(names)


def test_a_wrong_operator_has_no_speed(monkeypatch):
    operator = small("linear_attention")
    broken = replace(operator, forms={"wrong": Form(lambda *i: _doubled(operator, i))})
    shape = ratios.Shape("linear_attention", operator.cases[0], lambda case: (1.0, 0.0))
    monkeypatch.setattr(ratios, "exactly", lambda o, i: call(o, i, "definition"))
    with installed(broken), pytest.raises(SeqmixError, match="is wrong here: output off"):
        ratios.against_product([shape], "forward", "float32", TINY)


def _doubled(operator, inputs):
    output, state = operator.forms["chunked"].run(*inputs)
    return 2 * output, state


def test_a_floor_that_cannot_be_measured_says_why():
    def fail(settings):
        raise SeqmixError("there is no such thing")

    rows = measure_floor(Floor(what="a", against="b", at_least=2, measure=fail), TINY)
    (floor,) = summarise(rows, RECORD["roofs"])
    assert floor_cells(floor) == ["a", "b", "2x", "-", "not measured", "there is no such thing"]


def row(ratio, **more):
    return {
        "what": "a",
        "against": "b",
        "at_least": 2,
        "dtype": "float32",
        "sizes": {"T": int(10 * ratio)},
        "ratio": ratio,
        "times": {"ours": {"median_ms": 1000.0}},
        "work": {"flops": 5e8, "bytes": 2e8, "exponentials": 0},
    } | more


def test_the_worst_size_decides_and_its_limit_is_told():
    (floor,) = summarise([row(3.0), row(1.0), row(4.0)], RECORD["roofs"])
    assert (floor["ratio"], floor["best"], floor["reached"]) == (1.0, 4.0, False)
    shown = floor_cells(floor)
    assert shown[3:5] == ["1x to 4x", "no, 50% of it at T=10"]
    assert shown[5] == "arithmetic at a matrix product's speed 50%, memory 20%"
    assert summarise([row(2.0)], RECORD["roofs"])[0]["reached"] is True


def test_roofs_are_positive_and_explain_a_matrix_product():
    roofs = measure_roofs(TINY)
    assert min(roofs.flops_per_second, roofs.bytes_per_second, roofs.exponentials_per_second) > 0
    found = limits(row(1.0), RECORD["roofs"])
    assert sum(found.values()) == pytest.approx(0.7)


def test_speed_page_shows_the_kept_record_and_nothing_else(tmp_path):
    assert "No run is kept." in write_page("speed.md", tmp_path)
    rows = [row(3.0), row(1.0, what="c | d")]
    record = {**RECORD, "rows": rows, "floors": summarise(rows, RECORD["roofs"])}
    for entry in rows:
        entry["times"]["ours"] |= {"low_ms": 900.0, "high_ms": 1100.0}
    (tmp_path / "speed.json").write_text(json.dumps(record))
    page = write_page("speed.md", tmp_path)
    for shown in ("c \\| d", "| 2x | 3x | yes |", "1000 (900 to 1100)", "commit abc", "`T=10`"):
        assert shown in page


def test_the_kept_speeds_are_of_the_floors_of_today():
    path = ROOT / "docs" / "speed.json"
    if not path.exists():
        pytest.skip("no run of `seqmix bench --floors` is kept")
    kept = {
        (f["what"], f["against"]): f["at_least"] for f in json.loads(path.read_text())["floors"]
    }
    for floor in FLOORS:
        assert kept[floor.what, floor.against] == floor.at_least


def test_the_command_writes_and_prints_its_record(tmp_path, capfd):
    arguments = [
        "bench",
        "diagonal_scan",
        "--quick",
        "--length",
        "0",
        "--form",
        "chunked",
        "--seconds",
        "0",
    ]
    assert main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert {row["form"] for row in record["rows"]} == {"chunked"}
    assert {"cpu", "threads", "instruction_set", "commit", "versions"} <= set(record["machine"])
    assert "Every form" in (tmp_path / "bench.html").read_text()
    assert main(["bench", "--dtype", "float8", "--out", str(tmp_path)]) == 2


def test_case_moves_its_other_lengths_along():
    case = Case("a", {"T": 64, "S": 80, "L": 64, "D": 2})
    assert curves.at_length(case, 8).sizes == {"T": 8, "S": 24, "L": 8, "D": 2}
