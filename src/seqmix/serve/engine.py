"""Continuous batching: many requests share every step of one model, and each gets what it would get alone.

A step reads a piece of the prompts that wait, then one token for every answer under way. Rows of different lengths
end together in one state; a row joins when its prompt is read and leaves when its answer is done, without waiting
for the others.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seqmix.core.errors import DataError, RangeError, SeqmixError
from seqmix.core.state import State, concatenate_rows, fork, num_bytes, select_rows, trim_rows
from seqmix.generate import Constraint
from seqmix.generate.sampling import Sampling, draw, random_numbers
from seqmix.serve.prefix_cache import Node, PrefixCache
from seqmix.serve.reader import Reader


class QueueFull(SeqmixError):
    """As many requests wait as may wait; the same request may succeed later."""


@dataclass(frozen=True)
class Limits:
    """What one model may be asked for at once."""

    rows: int = 32  # answers under way
    queue: int = 128  # requests that wait
    context: int = 8192  # tokens of a prompt and its answer
    chunk: int = 256  # tokens of prompts read per step; states are kept at its multiples
    cache: int = 256 << 20  # bytes of kept states


@dataclass(frozen=True)
class Event:
    """One more token of an answer, or its end.

    `finish`: "length" comes with the last token; "stop" (an end-of-text token, which is not part of the answer, or a
    constraint that nothing may follow) and "error" come with none. `reason` says of an error that lies in what was
    asked for, not in the model, what it is.
    """

    answer: int
    token: int | None = None
    logprob: float = 0.0
    top: Sequence[tuple[int, float]] = ()
    finish: str | None = None
    reason: str | None = None


@dataclass(eq=False)
class Request:
    """A prompt and what is wanted; `listener` gets every event, on the engine's thread, and must not block.

    Answer i is drawn with the seed `seed + i`, and by a generator of its own.
    """

    prompt: Sequence[int]
    listener: Callable[[Event], object]
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    constraint: Constraint | None = None  # the language that answers must belong to
    seed: int = 0
    answers: int = 1
    ends: frozenset[int] = frozenset()  # tokens that end a text
    top_logprobs: int | None = None  # log-probabilities of each token and of so many likeliest ones
    reused: int = field(default=0, init=False)  # tokens of the prompt that were not read again
    _stopped: set[int] = field(default_factory=set, init=False)

    def stop(self, answer: int | None = None) -> None:
        """Gives up one answer, or all; their events end and their room becomes free at the next step."""
        self._stopped.update(range(self.answers) if answer is None else (answer,))

    def is_stopped(self, answer: int) -> bool:
        return answer in self._stopped

    @property
    def is_given_up(self) -> bool:
        return len(self._stopped) == self.answers


@dataclass(eq=False)
class _Row:
    """An answer under way."""

    request: Request
    answer: int
    node: Node
    generator: torch.Generator
    length: int  # tokens that the state has read
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False

    def finish(self, why: str, reason: str | None = None) -> None:
        """Ends the answer without a further token."""
        self.is_done = True
        self.request.stop(self.answer)
        self.request.listener(Event(self.answer, finish=why, reason=reason))

    @property
    def is_over(self) -> bool:
        return self.is_done or self.request.is_stopped(self.answer)


@dataclass(eq=False)
class _Reading:
    """A prompt of which `position` tokens are read."""

    request: Request
    node: Node
    state: State
    position: int


@dataclass
class Counts:
    """What an engine has done so far."""

    requests: int = 0
    refused: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0


class Engine:
    """One model and the requests to it. `step` does the work; `start` calls it on a thread of its own."""

    def __init__(self, reader: Reader, limits: Limits | None = None) -> None:
        self.reader = reader
        self.limits = limits or Limits()
        self.cache = PrefixCache(self.limits.cache)
        self.counts = Counts()
        self._waiting: deque[Request] = deque()
        self._reading: _Reading | None = None
        self._rows: list[_Row] = []
        self._state: State = None
        self._taken: set[Request] = set()  # those under way
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all answers under way."""
        return num_bytes(self._state)

    def submit(self, request: Request) -> None:
        """Takes a request in; raises `RangeError` for what can never be done, `QueueFull` for what may be later."""
        length, limits = len(request.prompt), self.limits
        if not length:
            raise RangeError("The prompt is empty. Give at least one token.")
        if request.max_tokens < 1 or length + request.max_tokens > limits.context:
            raise RangeError(
                f"The prompt has {length} tokens and max_tokens is {request.max_tokens}; together they may be at "
                f"most {limits.context}. Shorten one of them."
            )
        if not 1 <= request.answers <= limits.rows:
            raise RangeError(f"n={request.answers}, wanted 1 to {limits.rows} answers.")
        if not all(0 <= token < self.reader.vocabulary for token in request.prompt):
            raise RangeError(f"The prompt has a token outside 0 to {self.reader.vocabulary - 1}.")
        with self._changed:
            if len(self._waiting) >= limits.queue:
                self.counts.refused += 1
                raise QueueFull(f"{limits.queue} requests wait already. Try again later.")
            self.counts.requests += 1
            self._waiting.append(request)
            self._changed.notify()

    def start(self) -> None:
        """Begins to work on a thread of its own."""
        self._thread = threading.Thread(target=self._work, name="seqmix-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; what is under way gets no more events."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._has_work())
                if self._is_closed:
                    return
            try:
                self.step()
            except (
                Exception
            ):  # whatever it is, the requests under way must end and the next ones be served
                self._fail()

    def _has_work(self) -> bool:
        return bool(self._waiting or self._rows or self._reading)

    @torch.inference_mode()
    def step(self) -> bool:
        """One piece of waiting prompts and one token of every answer; False when there is nothing to do."""
        if not self._has_work():
            return False
        self.counts.steps += 1
        arrived = self._read_prompts()
        self._settle(arrived)
        if self._rows:
            ids = torch.tensor([[row.tokens[-1]] for row in self._rows])
            logits, self._state = self.reader.read(ids, self._state)
            for row in self._rows:
                row.length += 1
            self._extend(self._rows, logits)
            self._settle([])
        self._taken = {row.request for row in self._rows}
        if self._reading is not None:
            self._taken.add(self._reading.request)
        return True

    def _read_prompts(self) -> list[tuple[list[_Row], State]]:
        """Reads at most `chunk` tokens of prompts; returns the rows whose first token is now known."""
        arrived: list[tuple[list[_Row], State]] = []
        budget, taken = self.limits.chunk, sum(not row.is_over for row in self._rows)
        while budget > 0 and (reading := self._next_prompt(taken)) is not None:
            request, position = reading.request, reading.position
            to_boundary = self.limits.chunk - position % self.limits.chunk
            piece = request.prompt[position : position + min(to_boundary, budget)]
            logits, reading.state = self.reader.read(torch.tensor([piece]), reading.state)
            reading.position += len(piece)
            budget -= len(piece)
            self.counts.prompt_tokens += len(piece)
            is_read = reading.position == len(request.prompt)
            if is_read or reading.position % self.limits.chunk == 0:
                since = request.prompt[reading.node.length : reading.position]
                reading.node = self.cache.add(reading.node, since, reading.state)
            if is_read:
                self._reading = None
                taken += request.answers
                rows = [
                    _Row(
                        request, i, reading.node, random_numbers(request.seed + i), reading.position
                    )
                    for i in range(request.answers)
                ]
                self._extend(rows, logits.expand(len(rows), -1))
                arrived.append((rows, fork(reading.state, len(rows))))
        return arrived

    def _next_prompt(self, taken: int) -> _Reading | None:
        """The prompt under way, or the next one that there is room for."""
        if self._reading is not None and self._reading.request.is_given_up:
            self._reading = None
        while self._reading is None:
            with self._changed:
                while self._waiting and self._waiting[0].is_given_up:
                    self._waiting.popleft()
                if not self._waiting or taken + self._waiting[0].answers > self.limits.rows:
                    return None
                request = self._waiting.popleft()
            self._taken.add(request)
            node = self.cache.find(request.prompt[:-1])
            request.reused = node.length
            self.counts.reused_tokens += node.length
            self._reading = _Reading(request, node, node.state, node.length)
        return self._reading

    def _extend(self, rows: list[_Row], logits: Tensor) -> None:
        """Chooses the next token of every row, of logits [B, V]."""
        likeliest = logits.argmax(-1).tolist()
        for row, logit, best in zip(rows, logits, likeliest, strict=True):
            request = row.request
            if request.is_stopped(row.answer):
                continue
            try:
                token = _next_token(row, logit, best)
            except (
                SeqmixError
            ) as error:  # nothing to go on with: of what the constraint leaves, or at all
                row.finish("error", None if request.constraint is None else str(error))
                continue
            if token in request.ends:
                row.finish("stop")
                continue
            row.tokens.append(token)
            self.counts.answer_tokens += 1
            is_whole = request.constraint is not None and request.constraint.is_over(row.tokens)
            row.is_done = not is_whole and len(row.tokens) == request.max_tokens
            logprob = 0.0
            top: Sequence[tuple[int, float]] = ()
            if request.top_logprobs is not None:
                logprob, top = likelihood(logit, token, request.top_logprobs)
            if row.is_done:
                request.stop(row.answer)
            finish = "length" if row.is_done else None
            request.listener(Event(row.answer, token, logprob, top, finish))
            if is_whole:
                row.finish("stop")

    def _settle(self, arrived: list[tuple[list[_Row], State]]) -> None:
        """Lets rows leave whose answer is over, and the others join."""
        batches = [(self._rows, self._state), *arrived] if self._rows else arrived
        rows, states = [], []
        for members, state in batches:
            stay = [i for i, row in enumerate(members) if not row.is_over]
            self._keep_answers(members, state)
            if stay:
                rows += [members[i] for i in stay]
                states.append(state if len(stay) == len(members) else select_rows(state, stay))
        if rows == self._rows:
            return
        self._rows = rows
        whole = len(states) > 1
        self._state = concatenate_rows(states) if whole else states[0] if states else None
        if rows:
            self._state = trim_rows(self._state, max(row.length for row in rows))

    def _keep_answers(self, members: list[_Row], state: State) -> None:
        """Keeps the state after each finished answer: the next turn of a conversation begins with it."""
        for i, row in enumerate(members):
            if row.is_done:
                read = (*row.request.prompt, *row.tokens)[row.node.length : row.length]
                alone = state if len(members) == 1 else select_rows(state, [i])
                self.cache.add(row.node, read, trim_rows(alone, row.length))

    def _fail(self) -> None:
        """Ends everything under way with an error."""
        taken = self._taken
        self._rows, self._state, self._reading, self._taken = [], None, None, set()
        self.counts.errors += 1
        for request in taken:
            for answer in range(request.answers):
                if not request.is_stopped(answer):
                    request.stop(answer)
                    request.listener(Event(answer, finish="error"))


def _next_token(row: _Row, logits: Tensor, likeliest: int) -> int:
    """The token that follows, of logits [V] whose largest is at `likeliest`."""
    request, logits = row.request, logits.float()
    if request.constraint is not None:
        allowed = request.constraint.allowed(row.tokens, len(logits), request.ends)
        if not bool(allowed.any()):
            raise DataError(
                "response_format: the model's tokenizer cannot write the rest of a text of this language. "
                "Change the schema."
            )
        logits = logits.masked_fill(~allowed, -torch.inf)
    elif request.sampling.is_plain:
        return likeliest
    chances = request.sampling.probabilities(logits[None], list(request.prompt), [row.tokens])
    return draw(chances[0], row.generator)


def likelihood(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """log p of a token, and the `top` likeliest tokens with theirs; of the model itself, before any change."""
    shares = logits.float().log_softmax(-1)
    best = shares.topk(min(top, len(shares)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return float(shares[token]), list(pairs)
