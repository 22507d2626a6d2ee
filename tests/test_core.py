"""Catalogs, configurations, files, states and the layout language."""

import dataclasses
import os
from dataclasses import dataclass

import pytest
import torch

from seqmix.core import state as states
from seqmix.core.config import Config
from seqmix.core.errors import (
    CheckpointError,
    ConfigError,
    LayoutError,
    MissingExtra,
    RangeError,
    UnknownName,
)
from seqmix.core.extras import require
from seqmix.core.files import OutputError, new_folder, write_text
from seqmix.core.numerics import assert_as_accurate
from seqmix.core.state import Growing, History
from seqmix.mixers import MIXERS
from seqmix.models.backbone import LanguageModel, ModelSpec, count_parameters
from seqmix.models.layout import parse_layout, parse_part


def test_an_unknown_name_suggests_close_ones():
    with pytest.raises(UnknownName, match="Did you mean gated_linear_attention"):
        MIXERS.get("gated_linear_atention")


def test_hyphens_read_as_underscores():
    assert MIXERS.get("gated-linear-attention") is MIXERS.get("gated_linear_attention")


@dataclass(frozen=True, kw_only=True)
class Example(Config):
    width: int = 4
    rate: float = 1.0
    word: str | None = None
    flag: bool = False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, "no field 'widht'. Did you mean 'width'"),
        ({"width": 2.5}, "width=2.5 is not of type int"),
        ({"width": True}, "width=True is not of type int"),
        ({"flag": 1}, "flag=1 is not of type bool"),
        ({"word": 3}, "word=3 is not of type str"),
    ],
)
def test_a_wrong_field_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Example.from_dict(values)


def test_a_config_survives_a_round_trip():
    example = Example.from_dict({"width": 3, "rate": 2, "word": "x"})
    assert Example.from_dict(example.to_dict()) == example


def test_an_absent_extra_names_the_command():
    with pytest.raises(MissingExtra, match=r"pip install 'seqmix\[compare\]'"):
        require("surely_not_installed", extra="compare")


def test_outputs_appear_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out.txt"
    write_text(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "new \ud800")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_folder_of_the_user_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("x")
    with pytest.raises(OutputError, match="not empty"), new_folder(tmp_path / "mine"):
        pass

    def fail_half_way():
        with new_folder(tmp_path / "other") as folder:
            (folder / "half.txt").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert os.listdir(tmp_path) == ["mine"]


def test_a_full_disk_is_explained(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="Cannot write"):
        write_text(tmp_path / "file" / "out.txt", "x")


def test_nan_is_never_accurate():
    good = torch.ones(3)
    with pytest.raises(AssertionError, match="nan"):
        assert_as_accurate(good * torch.nan, good, good, what="nan")


def example_state():
    keys = Growing(torch.arange(12.0).reshape(2, 3, 2))
    return [{"keys": keys, "start": torch.tensor([0, 1])}, (torch.randn(2, 4), None)]


def test_a_fork_leaves_the_original_as_it_was():
    first = Growing(torch.zeros(1, 2, 1))
    one = first.append(torch.ones(1, 1, 1))
    two = first.append(
        torch.full((1, 1, 1), 2.0)
    )  # a fork: the same place in the cache, another value
    three = one.append(torch.full((1, 1, 1), 3.0))
    assert first.tensor.flatten().tolist() == [0, 0]
    assert one.tensor.flatten().tolist() == [0, 0, 1]
    assert two.tensor.flatten().tolist() == [0, 0, 2]
    assert three.tensor.flatten().tolist() == [0, 0, 1, 3]


def test_appending_to_the_newest_version_copies_nothing():
    with torch.no_grad():
        grown = Growing(torch.zeros(1, 2, 1)).append(torch.ones(1, 1, 1))
        assert grown.append(torch.ones(1, 1, 1)).tensor.data_ptr() == grown.tensor.data_ptr()


def test_gradients_flow_through_a_growing_tensor():
    new = torch.ones(1, 1, 1, requires_grad=True)
    Growing(torch.zeros(1, 2, 1)).append(new).tensor.sum().backward()
    assert new.grad.item() == 1


def test_rows_are_selected_everywhere():
    state = states.select_rows(example_state(), [1, 1, 0])
    assert states.num_rows(state) == 3
    assert state[0]["start"].tolist() == [1, 1, 0]
    assert state[0]["keys"].tensor[2].tolist() == example_state()[0]["keys"].tensor[0].tolist()
    with pytest.raises(RangeError, match="rows 0 to 1"):
        states.select_rows(state[1][0][:2], [2])


def test_forked_rows_lie_side_by_side():
    assert states.fork(example_state(), 2)[0]["start"].tolist() == [0, 0, 1, 1]


def test_a_state_survives_the_disk(tmp_path):
    state = example_state()
    back = states.load_state(states.save_state(state, tmp_path / "state.safetensors"))
    assert isinstance(back[1], tuple)
    assert isinstance(back[0]["keys"], Growing)
    for a, b in zip(states.leaves(state), states.leaves(back), strict=True):
        assert torch.equal(a, b)
    assert states.num_bytes(back) == states.num_bytes(state)


def test_a_damaged_state_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(CheckpointError, match="no state"):
        states.load_state(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged"):
        states.load_state(path)


def test_history_rolls_back_as_far_as_it_reaches():
    history = History(torch.zeros(1), depth=3)
    for value in (1.0, 2.0, 3.0):
        history.push(torch.full((1,), value))
    assert history.roll_back(2).item() == 1
    with pytest.raises(RangeError, match="reaches back 0"):
        history.roll_back(1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("mamba2", ["mamba2"]),
        ("3x[gated_delta_net], attention", ["gated_delta_net"] * 3 + ["attention"]),
        ("2 x [a, 2x b]", ["a", "b", "b"] * 2),
        (
            "attention(window=256, rope_base=1e4)/squared_relu",
            ["attention(window=256, rope_base=10000.0)/squared_relu"],
        ),
        ("a(flag=true, none_of_it=none, word=relu)", ["a(flag=true, none_of_it=none, word=relu)"]),
        ("xlstm, x", ["xlstm", "x"]),
        ("gated-delta-net", ["gated_delta_net"]),
    ],
)
def test_layouts_are_written_out(text, wanted):
    assert [str(entry) for entry in parse_layout(text)] == wanted


@pytest.mark.parametrize(
    ("text", "column", "wanted"),
    [
        ("", 1, "a mixer name"),
        ("a, , b", 4, "a mixer name"),
        ("3x[a, b", 8, r"close the '\[' of column 3"),
        ("a b", 3, "',' or the end"),
        ("a(window 3)", 10, "'=' after window"),
        ("a(window=)", 10, "a value for window"),
        ("0x[a]", 1, "a count of at least 1"),
        ("a]", 2, "',' or the end"),
    ],
)
def test_a_broken_layout_shows_where(text, column, wanted):
    with pytest.raises(LayoutError, match=wanted) as caught:
        parse_layout(text)
    message = str(caught.value)
    assert f"column {column}:" in message
    assert message.splitlines()[-1].index("^") == column + 1  # two columns of indentation


def test_a_part_stands_alone():
    assert parse_part("glu(activation=gelu)").options == {"activation": "gelu"}
    with pytest.raises(LayoutError, match="the end"):
        parse_part("glu, mlp")


def test_depth_repeats_the_layout_from_its_start():
    spec = ModelSpec(
        layout="2x[gated_linear_attention], gated_linear_attention(gate_rank=4)", depth=5
    )
    ranks = [entry.mixer.options.get("gate_rank") for entry in spec.entries()]
    assert ranks == [None, None, 4, None, None]


def test_parameters_are_counted_without_building():
    spec = ModelSpec(layout="gated_linear_attention", width=32, depth=2, vocabulary=11)
    model = LanguageModel(spec)
    assert count_parameters(spec) == model.num_parameters()
    untied = count_parameters(dataclasses.replace(spec, tied=False))
    assert untied == model.num_parameters() + 11 * 32


def test_an_option_of_another_mixer_is_refused():
    with pytest.raises(ConfigError, match="gated_linear_attention has no field 'window'"):
        LanguageModel(ModelSpec(layout="gated_linear_attention(window=4)"))


def test_blocks_may_have_no_channel_mixer():
    model = LanguageModel(ModelSpec(layout="gated_linear_attention/none", width=16, heads=2))
    assert model.backbone.blocks[0].channel is None
    logits, _ = model(torch.randint(258, (1, 5)))
    assert logits.shape == (1, 5, 258)
