"""The server's engine: requests that share every step get what they would get alone."""

from __future__ import annotations

import pytest
import torch

from seqmix.core.errors import RangeError
from seqmix.core.state import leaves, num_bytes
from seqmix.generate import Constraint, Sampling
from seqmix.serve.engine import Engine, Limits, likelihood
from seqmix.serve.prefix_cache import PrefixCache
from seqmix.serve.reader import SeqmixReader
from seqmix.serve.request import QueueFull, Request
from seqmix.testing.models import build, draw

LAYOUTS = (
    "2x[attention]",
    "2x[gated_linear_attention], attention(key_heads=1)",
    "mamba2/squared_relu, windowed_attention(window=4, sinks=2)/none",
    "gated_delta_net, attention(window=6)",
    "hyena, rwkv7",  # what grows here is no key-value cache
)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=LAYOUTS)
def reader(request):
    return SeqmixReader(build(request.param))


@pytest.fixture(scope="module")
def hybrid():
    return SeqmixReader(build(LAYOUTS[1]))


def prompt(length, seed):
    return draw(1, length, seed)[0].tolist()


class Answers(dict):
    """Collects what a request is told: tokens per answer, and how each ended."""

    def __init__(self):
        super().__init__()
        self.ends = {}
        self.events = []

    def __call__(self, event):
        assert event.answer not in self.ends, "an event after the end"
        self.events.append(event)
        if event.token is not None:
            self.setdefault(event.answer, []).append(event.token)
        if event.finish is not None:
            self.ends[event.answer] = event.finish


def ask(engine, *requests):
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    return [request.listener for request in requests]


def requests():
    """Prompts and answers of many lengths, greedy and drawn, some with several answers."""
    drawn = Sampling(temperature=1.3, top_k=20, top_p=0.95, min_p=0.01, presence_penalty=0.5)
    shared = prompt(11, 99)
    return [
        Request(
            (shared if i % 3 == 0 else []) + prompt(1 + 7 * i % 19, i),
            Answers(),
            max_tokens=1 + 5 * i % 13,
            sampling=drawn if i % 2 else GREEDY,
            seed=i,
            answers=1 + i % 3,
        )
        for i in range(6)
    ]


def test_requests_that_share_steps_get_what_they_get_alone(reader):
    limits = Limits(rows=8, chunk=5)
    together = Engine(reader, limits)
    got = ask(together, *requests())
    alone = [ask(Engine(reader, Limits(rows=8, chunk=5, cache=0)), each)[0] for each in requests()]
    assert got == alone
    assert together.counts.reused_tokens > 0
    assert [answers.ends for answers in got] == [answers.ends for answers in alone]
    assert together.num_rows == 0
    assert together.state_bytes == 0


def test_greedy_answers_are_those_of_full_forwards(reader):
    ids = prompt(7, 3)
    (got,) = ask(Engine(reader), Request(ids, Answers(), 6, GREEDY))
    for token in got[0]:
        assert token == int(reader.read([ids], None)[0].argmax())
        ids = [*ids, token]


def test_a_text_read_before_is_not_read_again(reader):
    engine = Engine(reader, Limits(chunk=8))
    text = prompt(30, 5)
    first = Request(text, Answers(), 6, GREEDY)
    again = Request(text, Answers(), 6, GREEDY)
    ask(engine, first)
    ask(engine, again)
    assert (first.reused, again.reused) == (0, 29)
    assert again.listener == first.listener
    # The next turn begins with the prompt and all of the answer but its last token, which nobody has read.
    turn = [*text, *first.listener[0], *prompt(4, 6)]
    follow, fresh = (Request(turn, Answers(), 6, GREEDY) for _ in range(2))
    ask(engine, follow)
    ask(Engine(reader, Limits(cache=0)), fresh)
    assert follow.reused == 35
    assert follow.listener == fresh.listener


class Watched(SeqmixReader):
    """Notes how many tokens of how many texts each call reads."""

    def __init__(self, reader):
        vars(self).update(vars(reader), calls=[])

    def _features(self, texts, state):
        self.calls.append([len(text) for text in texts])
        return super()._features(texts, state)


def test_prompts_that_wait_are_read_together(hybrid):
    engine = Engine(Watched(hybrid))
    ask(engine, *(Request(prompt(3 + i, i), Answers(), 2, GREEDY) for i in range(9)))
    assert engine.reader.calls == [[*range(2, 11)], [1] * 9, [1] * 9]


def test_prompts_make_no_logits(hybrid, monkeypatch):
    calls, real = [], hybrid.model.logits
    monkeypatch.setattr(hybrid.model, "logits", lambda features: calls.append(1) or real(features))
    ask(Engine(hybrid), *(Request(prompt(20 + i, i), Answers(), 2, GREEDY) for i in range(3)))
    assert len(calls) == 2


def test_prompts_that_begin_alike_are_read_once(hybrid):
    engine = Engine(hybrid, Limits(chunk=8))
    shared = prompt(21, 1)
    ask(engine, *(Request([*shared, i, i], Answers(), 2, GREEDY) for i in range(9)))
    assert engine.counts.prompt_tokens == 16 + 9 * 6
    same = [Request(shared[:15], Answers(), 2, GREEDY) for _ in range(9)]
    before = engine.counts.prompt_tokens
    ask(engine, *same)
    assert engine.counts.prompt_tokens - before == 6
    assert [each.reused for each in same] == [8] + [14] * 8


def test_a_long_prompt_stalls_neither_answers_nor_short_prompts(hybrid):
    engine = Engine(Watched(hybrid), Limits(chunk=64, piece=8))
    answer, long, short = (
        Request(prompt(length, length), Answers(), 40, GREEDY) for length in (3, 200, 5)
    )
    engine.submit(answer)
    engine.step()
    engine.submit(long)
    engine.submit(short)
    while not short.listener:
        engine.step()
    assert len(short.listener[0]) == 1
    assert engine.counts.steps == 2
    while not long.listener:
        engine.step()
    pieces = [call for call in engine.reader.calls if {*call} != {1}][1:]
    assert max(map(sum, pieces)) == 8
    assert engine.counts.steps - 1 == len(answer.listener[0]) - 1 == -(-(199 + 4) // 8)


def test_kept_states_stay_within_their_bytes_and_the_least_used_go_first(hybrid):
    def read(text):
        return hybrid.read([text], None)[1]

    texts = [prompt(8, seed) for seed in range(4)]
    size = num_bytes(read(texts[0])) + 8 * 8
    cache = PrefixCache(3 * size)
    root = cache.find([])
    for text in texts[:3]:
        cache.add(root, text, read(text))
    assert (cache.held.bytes, len(cache.held)) == (3 * size, 3)
    cache.find(texts[0])
    cache.add(root, texts[3], read(texts[3]))
    assert [cache.find(text).length for text in texts] == [8, 0, 8, 8]
    assert cache.held.bytes == 3 * size
    assert cache.add(root, prompt(40, 9), read(prompt(40, 9))).length == 40
    assert cache.held.bytes <= cache.limit
    assert (
        cache.add(root, prompt(90, 9), read(prompt(90, 9))) is root
    )  # larger than all of the room


def test_a_shared_beginning_takes_room_once(hybrid):
    cache = PrefixCache(1 << 30)
    text = prompt(40, 1)
    state = hybrid.read([text], None)[1]
    middle = cache.add(cache.find([]), text, state)
    before = cache.held.bytes
    for seed in (2, 3):
        more = hybrid.read([prompt(2, seed)], state)[1]
        cache.add(middle, prompt(2, seed), more)
    keys = 2 * 16 * 4  # bytes per token of the one attention block with one key head
    assert cache.held.bytes == 3 * before - 2 * 38 * (keys + 8)
    found = cache.find([*text, *prompt(2, 3), 1])
    assert found.length == 42
    for got, wanted in zip(leaves(found.state), leaves(more), strict=True):
        assert torch.equal(got, wanted)


def test_giving_up_frees_the_row_and_changes_no_other(hybrid):
    engine = Engine(hybrid, Limits(rows=2, chunk=4))
    lost, kept, third = (Request(prompt(5 + i, i), Answers(), 12, GREEDY) for i in range(3))
    for each in (lost, kept, third):
        engine.submit(each)
    for _ in range(5):
        engine.step()
    assert engine.num_rows == 2
    seen = len(lost.listener.events)
    lost.stop()
    while engine.step():
        pass
    assert len(lost.listener.events) == seen
    for each in (kept, third):
        (alone,) = ask(Engine(hybrid), Request(each.prompt, Answers(), 12, GREEDY))
        assert each.listener == alone


def test_a_waiting_request_that_is_given_up_is_never_read(hybrid):
    engine = Engine(hybrid)
    lost = Request(prompt(5, 0), Answers(), 4)
    engine.submit(lost)
    lost.stop()
    while engine.step():
        pass
    assert engine.counts.prompt_tokens == 0
    assert not lost.listener.events


def test_an_error_ends_what_is_under_way_and_the_engine_goes_on(hybrid, monkeypatch):
    engine = Engine(hybrid)
    done = []
    witness = Request(prompt(6, 1), done.append, 400, GREEDY)
    engine.submit(witness)
    engine.step()
    monkeypatch.setattr(hybrid, "read", None)
    with pytest.raises(TypeError):
        engine.step()
    engine._fail()
    monkeypatch.undo()
    assert done[-1].finish == "error"
    (after,) = ask(engine, Request(prompt(5, 0), Answers(), 4, GREEDY))
    assert after.ends == {0: "length"}


def test_limits(hybrid):
    engine = Engine(hybrid, Limits(rows=2, queue=1, context=20))
    for bad in (
        Request([], Answers()),
        Request(prompt(10, 0), Answers(), 11),
        Request([1], Answers(), 0),
        Request([1], Answers(), answers=3),
        Request([hybrid.vocabulary], Answers()),
    ):
        with pytest.raises(RangeError):
            engine.submit(bad)
    engine.submit(Request([1], Answers()))
    with pytest.raises(QueueFull):
        engine.submit(Request([1], Answers()))
    assert engine.counts.refused == 1


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(hybrid):
    text = prompt(9, 4)
    (whole,) = ask(Engine(hybrid), Request(text, Answers(), 8, GREEDY))
    end = whole[0][3]
    (short,) = ask(Engine(hybrid), Request(text, Answers(), 8, GREEDY, ends=frozenset([end])))
    assert short.get(0, []) == whole[0][: whole[0].index(end)]
    assert short.ends == {0: "stop"}


LOGITS = torch.tensor([1.0, 4.0, 3.0, 2.0, -5.0])


def test_log_probabilities_are_those_of_the_model():
    logprob, top = likelihood(LOGITS, 3, 2)
    assert logprob == pytest.approx(float(LOGITS.log_softmax(-1)[3]))
    assert [token for token, _ in top] == [1, 2]


class Alternating(Constraint):
    """Six tokens, 3 and 5 in turn; after `stuck` of them nothing may follow."""

    def __init__(self, stuck=6):
        self.stuck = stuck

    def allowed(self, ids, vocabulary, ends):
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        mask[(3, 5)[len(ids) % 2]] = len(ids) < self.stuck
        return mask

    def is_over(self, ids):
        return len(ids) == 6


def test_a_constraint_holds_and_ends_its_answer_alone(hybrid):
    bound, stuck, free = (
        Request(prompt(5, 7), Answers(), 8, GREEDY, constraint=constraint)
        for constraint in (Alternating(), Alternating(2), None)
    )
    together = ask(Engine(hybrid), bound, stuck, free)
    assert together[0][0] == [3, 5, 3, 5, 3, 5]
    assert bound.listener.ends == {0: "stop"}
    assert together[1][0] == [3, 5]
    assert stuck.listener.ends == {0: "error"}
    assert together[2] == ask(Engine(hybrid), Request(prompt(5, 7), Answers(), 8, GREEDY))[0]
