"""Servers are timed as a client sees them, and what is not an answer of the length asked for gets no time."""

from __future__ import annotations

import json
import random
import socket
import string
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from seqmix.cli._pages import write_page
from seqmix.core.errors import ConfigError, DataError, RangeError
from seqmix.measure.serving import Server, Workload, measure_servers

TEXT = "".join(random.Random(0).choices(string.ascii_lowercase, k=4000))
WORKLOADS = [Workload(streams=n, prompt_tokens=8, new_tokens=3) for n in (1, 4)]


@pytest.fixture
def server():
    """An address, the requests that came, and what is answered after three tokens."""
    asked, ends = [], {"status": 200, "finish": "length", "pieces": 3}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self._say(200, json.dumps({"data": [{"id": "first"}]}))

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            pieces = [{"text": "x"}] * ends["pieces"]
            events = [*pieces, {"text": "", "finish_reason": ends["finish"]}]
            lines = [f"data: {json.dumps({'choices': [event]})}\n\n" for event in events]
            self._say(ends["status"], "".join([*lines, "data: [DONE]\n\n"]))

        def _say(self, status, text):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1", asked, ends
    running.shutdown()
    running.server_close()


def test_every_server_gets_every_passage_once_and_a_row_per_workload(server, tmp_path):
    url, asked, _ = server
    servers = [Server("a", url), Server.parse(f"b={url}/#second")]
    record = measure_servers(servers, WORKLOADS, TEXT, out=tmp_path / "serving", rounds=2)
    assert [(row["server"], row["streams"]) for row in record["rows"]] == [
        ("a", 1), ("b", 1), ("a", 4), ("b", 4)
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["first_token_ms"] > 0
        assert row["token_ms"] >= 0
        assert row["tokens_per_second"] > 0
    by_model = {
        name: [each["prompt"] for each in asked if each["model"] == name]
        for name in ("first", "second")
    }
    assert sorted(by_model["first"]) == sorted(by_model["second"])
    assert len({*by_model["first"]}) == len(by_model["first"]) == 3 * (1 + 4)
    assert "| b | 4 | 8 | 3 |" in write_page("speed.md", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"status": 429}, "answers 429"), ({"finish": "stop"}, "early"), ({"pieces": 0}, "nothing")],
)
def test_what_is_no_whole_answer_is_refused(server, change, said, tmp_path):
    url, _, ends = server
    ends |= change
    with pytest.raises(DataError, match=said):
        measure_servers([Server("a", url)], WORKLOADS[:1], TEXT, out=tmp_path, rounds=1)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_not_there_is_named(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(DataError, match=f"mine: no answer from {url}.*Start the server"):
            measure_servers([Server("mine", url)], WORKLOADS, TEXT, out=tmp_path)
    assert not (tmp_path / "serving.json").exists()


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(DataError, match="characters"):
        measure_servers([], WORKLOADS, "short", out=tmp_path)
    with pytest.raises(RangeError, match="streams=0"):
        Workload(streams=0)
    for text in ("http://127.0.0.1", "a=127.0.0.1:8000", "=http://x"):
        with pytest.raises(ConfigError, match="NAME=URL"):
            Server.parse(text)
