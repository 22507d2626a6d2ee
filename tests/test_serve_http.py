"""The server, asked by OpenAI's own client over a socket, and by clients that mean harm."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MambaConfig

from seqmix.core.errors import ConfigError
from seqmix.data.text import Corpus
from seqmix.generate import Constraint
from seqmix.models.hf import SeqmixConfig
from seqmix.serve import run
from seqmix.serve.answers import Served
from seqmix.serve.engine import Engine, Limits
from seqmix.serve.metrics import METRICS
from seqmix.serve.state_folder import StateFolder
from seqmix.serve.writer import Writer
from seqmix.train.language import prepare

openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'seqmix[test]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'seqmix[serve]'")
import httpx  # noqa: E402
from tiny_server import SPEC, running, tiny_served  # noqa: E402

from seqmix.serve.app import create_app  # noqa: E402

KEY = "secret"


@pytest.fixture(scope="module")
def served():
    return tiny_served()


@pytest.fixture(scope="module")
def address(served):
    with running(create_app([served], api_key=KEY, body_bytes=20_000)) as url:
        yield url


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}) as made:
        yield made


def complete(client, prompt="To be", **options):
    return client.completions.create(
        **{"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0} | options
    )


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_streamed_or_whole_the_text_is_the_same(client):
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens == 5


def test_chats(client):
    messages = [{"role": "user", "content": "To be?"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 9, "seed": 3}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(**options, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    choice = whole.choices[0]
    assert text == choice.message.content
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == 9
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_several_answers_each_with_its_seed(client):
    many = complete(client, n=3, temperature=1.5, seed=7)
    texts = [choice.text for choice in sorted(many.choices, key=lambda c: c.index)]
    alone = [complete(client, temperature=1.5, seed=7 + i).choices[0].text for i in range(3)]
    assert texts == alone
    assert len({*texts}) > 1


def test_stop_strings_end_the_text_before_them(client):
    whole = complete(client).choices[0].text
    stop = whole[4:7]
    wanted = whole[: whole.index(stop)]
    got = complete(client, stop=[stop]).choices[0]
    assert (got.text, got.finish_reason) == (wanted, "stop")
    streamed = complete(client, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == wanted


def test_log_probabilities_of_completions(client):
    choice = complete(client, logprobs=3).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    for token, value, top in zip(
        choice.logprobs.tokens,
        choice.logprobs.token_logprobs,
        choice.logprobs.top_logprobs,
        strict=True,
    ):
        assert top[token] == value == max(top.values())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 3},
        {"max_tokens": 500},
        {"n": 99},
        {"stop": ""},
        {"prompt": ""},
        {"prompt": [10**6]},
        {"logit_bias": {"x": 1}},
        {"extra_body": {"unknown": 1}},
        {"extra_body": {"max_tokens": "12"}},
    ],
    ids=str,
)
def test_bad_requests(client, options):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **options)
    assert caught.value.body["message"]


def answer_in(client, response_format):
    messages = [{"role": "user", "content": "x"}]
    reply = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=40, response_format=response_format
    )
    return reply.choices[0]


def test_a_schema_is_followed(client):
    pytest.importorskip(
        "llguidance", reason="llguidance is not installed: pip install 'seqmix[serve]'"
    )
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    choice = answer_in(
        client, {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    )
    assert json.loads(choice.message.content)["a"] in ("x", "y")
    assert choice.finish_reason == "stop"
    assert answer_in(client, {"type": "json_object"}).message.content.startswith("{")


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "grammar"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/none"}}},
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_followed_is_refused(client, response_format):
    pytest.importorskip(
        "llguidance", reason="llguidance is not installed: pip install 'seqmix[serve]'"
    )
    with pytest.raises(openai.BadRequestError):
        answer_in(client, response_format)


class Stuck(Constraint):
    """After two tokens nothing may follow, and yet the text is not whole."""

    def allowed(self, ids, vocabulary, ends):
        return torch.full((vocabulary,), len(ids) < 2)

    def is_over(self, ids):
        return False


def test_a_constraint_that_leaves_no_token_is_refused_by_name(client, monkeypatch):
    async def constraint(served, body):
        return Stuck()

    monkeypatch.setattr("seqmix.serve.app.constraint", constraint)
    messages = [{"role": "user", "content": "x"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 9, "temperature": 0}
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(**options)
    stream = client.chat.completions.create(**options, stream=True)
    assert next(stream).choices[0].delta.content
    with pytest.raises(openai.APIError, match="response_format"):
        list(stream)
    assert complete(client).choices[0].finish_reason == "length"  # the others go on


@pytest.mark.parametrize("positions", [None, 64])
def test_a_context_is_no_longer_than_the_model_was_made_for(positions, tmp_path):
    model, words = prepare(
        dataclasses.replace(SPEC, positions=positions), "bytes", Corpus("c", ("x",)), seed=0
    )
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    assert run.prepare(tmp_path).engine.limits.context == (positions or Limits().context)
    assert run.prepare(tmp_path, context=50).engine.limits.context == 50
    if positions:
        with pytest.raises(ConfigError, match=f"at most {positions} tokens"):
            run.prepare(tmp_path, context=positions + 1)


def test_the_longest_text_of_models_of_transformers():
    assert run.longest_text(GPT2Config(n_positions=48)) == 48
    assert run.longest_text(LlamaConfig(max_position_embeddings=96)) == 96
    assert run.longest_text(SeqmixConfig.from_spec(SPEC, source={"n_positions": 48})) == 48
    assert run.longest_text(MambaConfig()) is None


def test_unknown_models_and_wrong_keys(address, client):
    with pytest.raises(openai.NotFoundError):
        complete(client, model="../../etc/passwd")
    stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="guess", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    ],
    ids=range(8),
)
def test_malformed_bodies_are_refused(http, body):
    answer = http.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_large_bodies_are_refused_whether_they_say_so_or_not(http):
    body = json.dumps({"model": "tiny", "prompt": "x" * 30_000}).encode()
    pieces = (body[i : i + 5000] for i in range(0, len(body), 5000))
    headers = {"Content-Type": "application/json"}
    for content in (body, pieces):
        assert http.post("/v1/completions", content=content, headers=headers).status_code == 413


def test_a_client_that_leaves_frees_its_row(http, served):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 190, "stream": True}
    before = served.engine.counts.answer_tokens
    with http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 10
    while served.engine.num_rows and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.engine.num_rows == 0
    assert served.engine.counts.answer_tokens - before < 190


def test_health_and_metrics(http):
    assert http.get("/health").json() == {"status": "ok"}
    text = http.get("/metrics").text
    for name in METRICS:
        assert f'seqmix_{name}{{model="tiny"}} ' in text


def stream_one(client, i):
    options = {"temperature": 1.2 if i % 2 else 0, "seed": i, "max_tokens": 3 + i % 7}
    stream = complete(client, f"Question {i}: " + "x" * (i % 17), stream=True, **options)
    return "".join(chunk.choices[0].text for chunk in stream)


def test_many_streams_at_once_each_get_their_own_answer(client):
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda i: stream_one(client, i), range(64)))
    some = range(0, 64, 7)
    assert [together[i] for i in some] == [stream_one(client, i) for i in some]


LOAD_SECONDS = 120


@pytest.mark.slow
def test_minutes_of_many_streams_lose_and_mix_nothing(client, served, tmp_path):
    """States come and go between memory and disk meanwhile, for there is room for few."""
    alone = [stream_one(client, i) for i in range(100)]
    limits = dataclasses.replace(served.engine.limits, piece=8, cache=100_000)
    engine = Engine(served.engine.reader, limits, StateFolder(tmp_path, "f" * 64, 400_000))
    end = time.monotonic() + LOAD_SECONDS

    def keep_asking(worker):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            for i in itertools.count(worker):
                if time.monotonic() > end:
                    return i
                assert stream_one(client, i % 100) == alone[i % 100]

    with (
        running(create_app([Served("tiny", engine, served.tokenizer)])) as url,
        ThreadPoolExecutor(64) as pool,
    ):
        asked = sum(last - first for first, last in enumerate(pool.map(keep_asking, range(64))))
    assert asked > 64
    assert engine.cache.read_states > 0
    assert engine.num_rows == 0


@pytest.mark.parametrize("examples", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_nothing_that_the_description_allows_or_forbids_breaks_the_server(
    address, served, examples
):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    hypothesis = pytest.importorskip("hypothesis")
    schema = schemathesis.openapi.from_dict(create_app([served]).openapi())
    seen = set()

    for operation in schema.get_all_operations():

        @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True)
        @hypothesis.given(operation.ok().as_strategy())
        def sent(case):
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny"
            answer = case.call(base_url=address, headers={"Authorization": f"Bearer {KEY}"})
            seen.add(answer.status_code)

        sent()
    assert 200 in seen
    assert max(seen) < 500


class Letters:
    """A tokeniser of bytes."""

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("naïve ∑ ok 🙂", (), "naïve ∑ ok 🙂"),
        ("one two three", ("two",), "one "),
        ("aab", ("ab",), "a"),
        ("abab", ("abc",), "abab"),
        ("xy", ("y", "x"), ""),
    ],
)
def test_pieces_of_text_are_whole_characters_before_the_stop(text, stops, wanted):
    writer = Writer(Letters(), stops)
    pieces = [writer.add(byte) for byte in text.encode()] + [writer.end()]
    assert "".join(pieces) == wanted
    assert "\ufffd" not in "".join(pieces)
    assert writer.is_stopped == (wanted != text)
