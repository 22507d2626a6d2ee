"""How fast servers of OpenAI's API answer: time to the first token, decoding, and throughput, by number of streams.

Every server gets the same passages of the same text. Servers take turns, so only one works at a time; each number is
the median over rounds, and a round is one request per stream, all sent at once.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seqmix.core.errors import ConfigError, DataError, RangeError
from seqmix.core.extras import require
from seqmix.core.files import write_text
from seqmix.measure.machine import describe

CHARACTERS = 4  # of a token of English text, about
LONGEST = 3600.0  # seconds that an answer may take


@dataclass(frozen=True)
class Server:
    """An address such as `http://127.0.0.1:8000/v1`, and the model there; the first that it names by default."""

    name: str
    url: str
    model: str | None = None

    @classmethod
    def parse(cls, text: str) -> Server:
        """`NAME=URL`, or `NAME=URL#MODEL` where the server has several models."""
        name, _, address = text.partition("=")
        url, _, model = address.partition("#")
        if not name or not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"server={text!r}, wanted NAME=URL or NAME=URL#MODEL, as in ours=http://127.0.0.1:8000/v1."
            )
        return cls(name, url.rstrip("/"), model or None)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests: `streams` at once, with prompts of about `prompt_tokens` tokens and `new_tokens` wanted by each."""

    streams: int
    prompt_tokens: int = 128
    new_tokens: int = 64

    def __post_init__(self) -> None:
        if min(self.streams, self.prompt_tokens) < 1 or self.new_tokens < 2:
            raise RangeError(
                f"streams={self.streams}, prompt_tokens={self.prompt_tokens}, new_tokens={self.new_tokens}, wanted at "
                "least 1, 1 and 2."
            )


@dataclass(frozen=True)
class Answer:
    """When the pieces of one answer came, in seconds since it was asked for, and its tokens."""

    first: float
    last: float
    tokens: int


def measure_servers(
    servers: Sequence[Server],
    workloads: Sequence[Workload],
    text: str,
    *,
    out: Path,
    rounds: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """A row for every workload and server, kept in `out/serving.json`; no passage of `text` is a prompt twice.

    Raises `DataError` for a text that is too short, or a server that is not there, answers with an error, ends a text
    early or says nothing.
    """
    needed = sum(w.streams * w.prompt_tokens for w in workloads) * (rounds + 1) * CHARACTERS
    if len(text) < needed:
        raise DataError(
            f"The text has {len(text)} characters; {needed} are needed for the prompts."
        )
    place, rows = 0, []
    for workload in workloads:
        size = workload.prompt_tokens * CHARACTERS
        found: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for number in range(rounds + 1):
            prompts = [
                text[place + i * size : place + (i + 1) * size] for i in range(workload.streams)
            ]
            place += size * workload.streams
            for server in servers:
                measured = asyncio.run(_round(server, prompts, workload.new_tokens))
                if number:  # the round before them warms up
                    found[server.name].append(measured)
        for name, measures in found.items():
            row = {"server": name, **asdict(workload)}
            for what in measures[0]:
                row[what] = statistics.median(each[what] for each in measures)
            rows.append(row)
            say(
                f"{name}, {workload.streams} streams after {workload.prompt_tokens} tokens: first token "
                f"{row['first_token_ms']:.0f} ms, {row['tokens_per_second']:.1f} tokens/s"
            )
    record = {
        "machine": describe(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": rounds,
        "rows": rows,
    }
    write_text(out / "serving.json", json.dumps(record, indent=1) + "\n")
    return record


async def _round(server: Server, prompts: Sequence[str], new_tokens: int) -> dict[str, float]:
    """One request per prompt, all at once."""
    httpx = require("httpx", extra="serve")
    limits = httpx.Limits(max_connections=len(prompts) + 1)
    try:
        async with httpx.AsyncClient(timeout=LONGEST, limits=limits) as client:
            model = server.model or await _first_model(client, server)
            start = time.perf_counter()
            answers = await asyncio.gather(
                *(_ask(client, server, model, prompt, new_tokens) for prompt in prompts)
            )
            seconds = time.perf_counter() - start
    except httpx.TransportError as error:
        raise DataError(
            f"{server.name}: no answer from {server.url} ({str(error) or type(error).__name__}). Start the server, "
            "wait until it has loaded its model, or leave it out."
        ) from error
    return {
        "first_token_ms": 1e3 * statistics.median(answer.first for answer in answers),
        "token_ms": 1e3
        * statistics.median((each.last - each.first) / (each.tokens - 1) for each in answers),
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
    }


async def _first_model(client: Any, server: Server) -> str:
    answer = await client.get(f"{server.url}/models")
    if answer.status_code != 200:
        raise DataError(f"{server.name}: {server.url}/models answers {answer.status_code}.")
    return str(answer.json()["data"][0]["id"])


async def _ask(client: Any, server: Server, model: str, prompt: str, new_tokens: int) -> Answer:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
    }
    start, times, finish = time.perf_counter(), [], None
    async with client.stream("POST", f"{server.url}/completions", json=body) as response:
        if response.status_code != 200:
            said = (await response.aread()).decode(errors="replace")[:200]
            raise DataError(f"{server.name} answers {response.status_code}: {said}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choice = _choice(server, json.loads(line.removeprefix("data: ")))
                if choice.get("text"):
                    times.append(time.perf_counter() - start)
                finish = choice.get("finish_reason") or finish
    if not times:
        raise DataError(f"{server.name} says nothing after {prompt[-20:]!r}.")
    # The pieces of a stream need not be tokens, but an answer that was cut off has all that were asked for.
    if finish != "length":
        raise DataError(
            f"{server.name} ends a text early ({finish}): its tokens are not known. Take another text."
        )
    return Answer(times[0], times[-1], new_tokens)


def _choice(server: Server, event: Mapping[str, Any]) -> Mapping[str, Any]:
    if "error" in event:
        raise DataError(f"{server.name}: {event['error']}")
    choices: Sequence[Mapping[str, Any]] = event.get("choices") or [{}]
    return choices[0]
