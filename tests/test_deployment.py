"""Serving long contexts: the formulas, and that they hold for every kind of state."""

from mmap import ACCESS_READ, mmap

import pytest
import torch

from seqmix.core.errors import ConfigError
from seqmix.measure.deployment import A100, Deployment, Hardware, Session, this_machine
from seqmix.measure.memory import allocated_bytes, resident_bytes, return_freed
from seqmix.models.backbone import ModelSpec, count_parameters

SMALL = {"width": 64, "depth": 2, "heads": 2}
BOX = Hardware("a box", 1e9, 1e8, 1e7, 1e6)
LAYOUTS = ("attention", "attention(key_heads=1)", "gated_delta_net, attention", "mamba2")


def served(layout="attention", hardware=BOX, **options):
    return Deployment(ModelSpec(layout=layout, **SMALL), hardware, **options)


def test_a_cache_of_keys_and_values_is_counted_in_the_wanted_precision():
    two, four = (served(element_bytes=n) for n in (2, 4))
    cache = 2 * 1000 * 64 * 2  # keys and values, tokens, width, layers
    assert four.state_bytes(1000) == pytest.approx(4 * cache, rel=0.01)
    assert two.state_bytes(1000) == four.state_bytes(1000) / 2
    assert two.weight_bytes == 2 * count_parameters(two.spec)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_so_many_states_fit_beside_the_weights_and_not_one_more(layout):
    here = served(layout)
    users = here.concurrency(500)
    size = here.state_bytes(500)
    assert here.weight_bytes + users * size <= BOX.memory_bytes
    assert here.weight_bytes + (users + 1) * size > BOX.memory_bytes


def test_weights_that_do_not_fit_leave_no_room_for_users():
    tiny = Hardware("tiny", 1e9, 1e8, 1000.0, 1e6)
    assert served(hardware=tiny).concurrency(10) == 0
    assert served(hardware=tiny).sessions_per_hour(Session(10), 1) == 0.0


def test_a_recurrent_state_costs_the_same_after_any_context():
    short, long = ((f(100), f(10000)) for f in (served("mamba2").state_bytes, served().state_bytes))
    assert short[0] == short[1]
    assert long[1] == pytest.approx(100 * long[0], rel=0.05)
    recurrent = served("mamba2")
    assert recurrent.decode_seconds(100) == recurrent.decode_seconds(10000)
    assert recurrent.switch_seconds(100) == recurrent.switch_seconds(10000)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_users_who_decode_together_share_the_reading_of_the_weights(layout):
    here = served(layout)
    one, four = here.decode_seconds(500), here.decode_seconds(500, users=4)
    assert one <= four < 4 * one
    assert here.decode_seconds(500, tokens=7) == pytest.approx(7 * one)


def test_reading_in_chunks_takes_at_least_as_long_and_longer_texts_longer():
    here = served()
    assert here.prefill_seconds(1000, chunk=100) >= here.prefill_seconds(1000)
    assert here.prefill_seconds(2000) > 2 * here.prefill_seconds(1000)


def test_more_devices_are_faster_and_hold_more_users():
    assert served(hardware=BOX.times(2)).concurrency(500) > 2 * served().concurrency(500)
    half = served(hardware=A100.times(4)).prefill_seconds(500)
    assert half == pytest.approx(served(hardware=A100).prefill_seconds(500) / 4)
    with pytest.raises(ConfigError, match="devices=0"):
        BOX.times(0)


def test_switching_costs_sessions_only_where_users_take_turns():
    here = served()
    session = Session(500, questions=3, answer=20)
    fit = here.concurrency(500)
    slow = served(hardware=Hardware("slow swap", 1e9, 1e8, 1e7, 1.0))
    assert here.sessions_per_hour(session, fit) == slow.sessions_per_hour(session, fit)
    assert here.sessions_per_hour(session, fit + 1) > slow.sessions_per_hour(session, fit + 1)
    with pytest.raises(ConfigError, match="users=0"):
        here.sessions_per_hour(session, 0)


def test_numbers_need_bytes():
    with pytest.raises(ConfigError, match="element_bytes=0"):
        served(element_bytes=0)


def test_freed_memory_goes_back_so_that_what_is_allocated_next_counts():
    held = [torch.ones(2**18) for _ in range(64)]  # one MiB each
    del held
    return_freed()
    before = allocated_bytes()
    held = [torch.ones(2**18) for _ in range(64)]
    grown = allocated_bytes() - before
    assert grown == pytest.approx(sum(t.numel() * t.element_size() for t in held), rel=0.1)


def test_pages_of_files_are_not_allocated(tmp_path):
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    before, resident = allocated_bytes(), resident_bytes()
    with open(tmp_path / "file", "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as pages:
        assert sum(pages[:: 1 << 12]) == 0  # reads every page
        assert resident_bytes() - resident > size / 4
        assert abs(allocated_bytes() - before) < size / 8


def test_this_machine_is_measured():
    machine = this_machine(1e9, seconds=0.0)
    assert machine.flops_per_second > 0
    assert machine.swap_bytes_per_second == machine.bytes_per_second / 2
