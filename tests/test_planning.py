"""Tree search over tokens, and the sandbox that judges programs."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from seqmix.core.errors import ConfigError, RangeError
from seqmix.generate import Beams, Constraint, Planning, Sandbox
from seqmix.generate._memory import Memory
from seqmix.generate._method import Task
from seqmix.generate._reader import reader_of
from seqmix.models.hf import create

VOCABULARY, END = 5, 0
LAYOUTS = ["2x[attention]", "mamba2, attention"]


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request):
    torch.manual_seed(0)
    return create(request.param, width=16, heads=2, vocabulary=VOCABULARY).eval()


def task(**options):
    return Task(prompt=torch.tensor([[1, 2, 3]]), new_tokens=3, ends=frozenset([END]), **options)


def every_text():
    """All that can be written in three tokens, of which the first END is the last."""
    for ids in itertools.product(range(VOCABULARY), repeat=3):
        cut = ids.index(END) + 1 if END in ids else 3
        if all(token == 0 for token in ids[cut:]):
            yield list(ids[:cut])


def worth(ids):
    return ids.count(4) / 3


def rare(model):
    """A reward that likes the token which the model likes least, but for END."""
    with torch.inference_mode():
        token = int(model(torch.tensor([[1, 2, 3]])).logits[0, -1, 1:].argmin()) + 1
    return lambda ids: ids.count(token) / 3


def search(model, method, asked, memory=None):
    with torch.inference_mode():
        return method.search(memory or Memory(reader_of(model)), asked)


# ---- the search


def test_with_all_candidates_and_time_it_finds_every_text_once(model):
    found = search(model, Planning(reward=worth, rollouts=1000, candidates=VOCABULARY), task())
    assert sorted(each.text.ids for each in found) == sorted(every_text())
    assert found[0].text.ids == [4, 4, 4]
    likelihoods = [(-each.reward, -each.text.log_probability) for each in found]
    assert likelihoods == sorted(likelihoods)


def test_log_probabilities_are_those_of_the_model(model):
    for each in search(model, Planning(reward=worth, rollouts=6), task()):
        ids = torch.tensor([[1, 2, 3, *each.text.ids]])
        logs = model(ids).logits[0, 2:-1].detach().log_softmax(-1)
        wanted = sum(float(row[token]) for row, token in zip(logs, each.text.ids, strict=True))
        assert each.text.log_probability == pytest.approx(wanted, abs=1e-4)


def test_the_first_text_is_the_likeliest_and_rewards_lead_away_from_it(model):
    worth, calls = rare(model), []

    def reward(ids):
        calls.append(ids)
        return worth(ids)

    found = search(model, Planning(reward=reward, rollouts=12, candidates=VOCABULARY), task())
    with torch.inference_mode():
        greedy = Beams(width=1).decode(reader_of(model), task())[0]
    assert calls[0] == greedy.ids
    assert len(found) == len(calls) == 12  # every rollout is another text, judged once
    assert found[0].reward > worth(greedy.ids)


def test_it_finds_better_texts_than_as_many_beams(model):
    worth = rare(model)
    planned = search(model, Planning(reward=worth, rollouts=20, candidates=VOCABULARY), task())
    with torch.inference_mode():
        beams = Beams(width=20).decode(reader_of(model), task(texts=20))
    assert planned[0].reward > max(worth(text.ids) for text in beams)


def test_nothing_is_read_twice(model):
    memory = Memory(reader_of(model))
    method = Planning(reward=worth, rollouts=12)
    first = search(model, method, task(), memory)
    read = memory.tokens
    assert (
        read == 3 + len(memory.known) - 1
    )  # the prompt at once, then one token for each beginning
    assert search(model, method, task(), memory) == first
    assert memory.tokens == read < memory.asked


def test_a_memory_reads_as_the_model_does(model):
    reader = reader_of(model)
    with torch.inference_mode():
        memory = Memory(reader)
        for _ in range(2):
            plain, remembered = (
                Beams(width=3).decode(each, task(texts=3)) for each in (reader, memory)
            )
            assert [text.ids for text in plain] == [text.ids for text in remembered]
        ragged = memory.select(memory.read(torch.tensor([[1, 2], [1, 3]])).state, [1, 0, 1])
        logits = memory.read(torch.tensor([[2, 2], [3, 4], [2, 1]]), ragged).logits[:, -1]
        wanted = model(torch.tensor([[1, 3, 2, 2], [1, 2, 3, 4], [1, 3, 2, 1]])).logits[:, -1]
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(RangeError, match="keep=2"):
        memory.read(torch.tensor([[1]]), keep=2)


class Falling(Constraint):
    """Tokens that only fall; a text is over at 1."""

    def allowed(self, ids, vocabulary, ends):
        return torch.arange(vocabulary) < (ids[-1] if ids else vocabulary)

    def is_over(self, ids):
        return bool(ids) and ids[-1] <= 1


def test_a_constraint_holds_for_whole_texts(model):
    asked = Task(prompt=torch.tensor([[1, 2, 3]]), new_tokens=6, constraint=Falling())
    found = search(model, Planning(reward=len, rollouts=99, candidates=5), asked)
    texts = [each.text.ids for each in found]
    assert len(texts) == 16
    assert len(texts[0]) == 4  # the longest is worth most
    assert all(ids == sorted(set(ids), reverse=True) for ids in texts)
    assert all(each.text.is_ended for each in found)


@pytest.mark.parametrize("option", ["rollouts", "candidates", "width"])
def test_options_out_of_range(option):
    with pytest.raises(RangeError, match=f"{option}=0"):
        Planning(reward=len, **{option: 0})


# ---- the sandbox

# `import sys` is refused, so a program that means harm goes this way.
GET_SYS = """
for kind in ().__class__.__base__.__subclasses__():
    if kind.__name__ == "_wrap_close":
        sys = kind.__init__.__globals__["sys"]
"""


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(seconds=0.4) as made:
        yield made


def test_values_of_a_program(sandbox):
    program = "import math\ndef f(x):\n    print('lost')\n    return x + 1"
    assert sandbox.run(program, ["f(1)", "f('a')", "f(", "math.pi > 3"]) == [
        "2",
        None,
        None,
        "True",
    ]
    assert sandbox.run("def f(", ["1"]) == [None]


def test_what_one_program_does_the_next_does_not_see(sandbox):
    sandbox.run("import math; math.pi = 3; leftover = 1", ["math.pi"])
    assert sandbox.run("import math", ["math.pi == 3", "leftover"]) == ["False", None]


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "10 ** 10 ** 10", "x = [0]\nwhile True: x = x + x", "raise SystemExit"],
)
def test_a_program_that_does_not_end_well_has_no_values(sandbox, program):
    assert sandbox.run(program, ["1", "2"]) == [None, None]
    assert sandbox.run("", ["1"]) == ["1"]  # and the next one is not hurt


def test_values_before_an_endless_one_are_kept(sandbox):
    assert sandbox.run("def f():\n    while True: pass", ["1", "f()", "2"]) == ["1", None, None]


def test_memory_is_bounded_and_the_rest_goes_on(sandbox):
    assert sandbox.run("", ["len([0] * 10**9)", "2"]) == [None, "2"]


@pytest.mark.parametrize(
    "act",
    [
        "open('/proc/self/status').read()",
        "open('here', 'w')",
        "__import__('socket').socket()",
        "__import__('subprocess').run(['true'])",
        "__import__('_posixsubprocess')",
        "sys.modules['os'].fork()",
        "sys.modules['os'].system('true')",
        "sys.modules['os'].execv('/bin/true', ['true'])",
        "sys.modules['os'].kill(sys.modules['os'].getppid(), 9)",
        "sys.modules['os'].listdir('/')",
        "sys.modules['os'].remove('/tmp/none')",
        "sys.modules['ctypes'].CDLL(None)",
    ],
)
def test_acts_are_refused(sandbox, act):
    program = f"{GET_SYS}refused = False\ndef act():\n    global refused\n    try:\n        return {act}\n"
    program += "    except PermissionError:\n        refused = True"
    assert sandbox.run(program, ["act()", "refused"]) == ["None", "True"]


def test_what_a_program_writes_itself_is_bounded(sandbox):
    write = "sys.modules['os'].write(3, b'x' * 10**8)"
    assert sandbox.run(GET_SYS, [write, "1"]) == [None, None]


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_no_network_device_where_the_kernel_permits(sandbox):
    assert isinstance(sandbox.has_own_network, bool)


def test_the_process_ends_with_the_block():
    with Sandbox() as made:
        server, folder = made._server, Path(made._folder.name)
        assert folder.exists()
    assert server.poll() is not None
    assert not folder.exists()
    with pytest.raises(ConfigError, match="with"):
        made.run("", ["1"])


def test_an_end_of_the_process_is_told():
    with Sandbox() as made:
        made._server.kill()
        made._server.wait()
        with pytest.raises(ConfigError, match="process has ended"):
            made.run("", ["1"])


@pytest.mark.parametrize("limits", [{"seconds": 0.0}, {"memory": 1024}])
def test_limits_in_which_nothing_runs(limits):
    with pytest.raises(RangeError, match=next(iter(limits))):
        Sandbox(**limits)
