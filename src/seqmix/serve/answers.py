"""One request of a client, from its tokens to pieces of text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from seqmix.generate import Constraint
from seqmix.generate.sampling import Sampling
from seqmix.serve.engine import Engine
from seqmix.serve.protocol import Body
from seqmix.serve.request import Event, Request
from seqmix.serve.writer import Writer

ANSWER_TOKENS = 256  # of a request that says nothing


@dataclass(frozen=True)
class Served:
    """A model under its name."""

    name: str
    engine: Engine
    tokenizer: Any
    ends: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Piece:
    """More text of one answer; the event that brought it; and how the answer ended, if it did."""

    answer: int
    text: str
    event: Event
    finish: str | None


class Answers:
    """Submits on creation (raising what the engine raises); `pieces` gives up what is under way when it is left."""

    def __init__(
        self,
        served: Served,
        prompt: Sequence[int],
        body: Body,
        sampling: Sampling,
        *,
        top: int | None,
        max_tokens: int | None,
        constraint: Constraint | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        room = served.engine.limits.context - len(prompt)
        self.request = Request(
            prompt,
            lambda event: loop.call_soon_threadsafe(self._events.put_nowait, event),
            max_tokens=max(1, min(ANSWER_TOKENS, room)) if max_tokens is None else max_tokens,
            sampling=sampling,
            constraint=constraint,
            seed=body.seed or 0,
            answers=body.n or 1,
            ends=served.ends,
            top_logprobs=top,
        )
        self._writers = [Writer(served.tokenizer, body.stops) for _ in range(self.request.answers)]
        self.tokens = 0
        served.engine.submit(self.request)

    async def pieces(self) -> AsyncIterator[Piece]:
        under_way = set(range(self.request.answers))
        try:
            while under_way:
                event = await self._events.get()
                if event.answer not in under_way:
                    continue  # it went on for a token after its stop string
                writer, finish = self._writers[event.answer], event.finish
                text = ""
                if event.token is not None:
                    self.tokens += 1
                    text = writer.add(event.token)
                if finish is not None:
                    text += writer.end()
                if writer.is_stopped:
                    finish = "stop"
                    self.request.stop(event.answer)
                if finish is not None:
                    under_way.discard(event.answer)
                yield Piece(event.answer, text, event, finish)
        finally:
            self.request.stop()

    @property
    def usage(self) -> dict[str, Any]:
        prompt = len(self.request.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.request.reused},
        }
