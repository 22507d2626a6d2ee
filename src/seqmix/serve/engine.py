"""Continuous batching: many requests share every step of one model, and each gets what it would get alone.

A step reads pieces of the prompts that wait, all at once, then one token for every answer under way. Rows of different
lengths end together in one state; a row joins when its prompt is read but for the last token, and leaves when its
answer is done, without waiting for the others.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seqmix.core.errors import DataError, RangeError, SeqmixError
from seqmix.core.state import State, num_bytes, trim_rows
from seqmix.generate.sampling import draw, random_numbers
from seqmix.serve.prefix_cache import Node, PrefixCache
from seqmix.serve.reader import Reader
from seqmix.serve.request import Event, QueueFull, Request
from seqmix.serve.state_folder import StateFolder


@dataclass(frozen=True)
class Limits:
    """What one model may be asked for at once."""

    rows: int = 32  # answers under way
    queue: int = 128  # requests that wait
    context: int = 8192  # tokens of a prompt and its answer
    chunk: int = 256  # tokens of prompts read per step; states are kept at its multiples
    piece: int = 64  # the same while answers are under way, so that they go on
    cache: int = 256 << 20  # bytes of states kept in memory
    states: int = 4 << 30  # bytes of states kept in a folder, if there is one


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
    def last(self) -> int:
        """The token that is read next."""
        return self.tokens[-1] if self.tokens else self.request.prompt[-1]

    @property
    def is_over(self) -> bool:
        return self.is_done or self.request.is_stopped(self.answer)


@dataclass(eq=False)
class _Reading:
    """A prompt of which `position` tokens are read. Its last token is read with the answers: they begin there."""

    request: Request
    node: Node
    state: State = None
    position: int = 0

    @property
    def left(self) -> int:
        return len(self.request.prompt) - 1 - self.position

    def piece(self, chunk: int) -> int:
        """Tokens to the next place whose state is kept: a multiple of `chunk`, or the end."""
        return min(chunk - self.position % chunk, self.left)

    def until(self, chunk: int) -> tuple[int, ...]:
        """The text up to there."""
        return tuple(self.request.prompt[: self.position + self.piece(chunk)])

    def rows(self) -> Iterator[_Row]:
        """The answers to the prompt, now that it is read."""
        for i in range(self.request.answers):
            generator = random_numbers(self.request.seed + i)
            yield _Row(self.request, i, self.node, generator, self.position)


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

    def __init__(
        self, reader: Reader, limits: Limits | None = None, states: StateFolder | None = None
    ) -> None:
        self.reader = reader
        self.limits = limits or Limits()
        self.cache = PrefixCache(self.limits.cache, states)
        self.counts = Counts()
        self._waiting: deque[Request] = deque()
        self._readings: list[_Reading] = []  # the oldest first
        self._rows: list[_Row] = []
        self._state: State = None
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
        return bool(self._waiting or self._rows or self._readings)

    @torch.inference_mode()
    def step(self) -> bool:
        """Pieces of waiting prompts and one token of every answer; False when there is nothing to do."""
        if not self._has_work():
            return False
        self.counts.steps += 1
        self._take_in()
        self._read_prompts()
        self._settle()
        if self._rows:
            logits, self._state = self.reader.read([[row.last] for row in self._rows], self._state)
            for row in self._rows:
                row.length += 1
            self._extend(self._rows, logits)
            self._settle()
        return True

    def _take_in(self) -> None:
        """Lets those that wait begin, the oldest first, as long as there is room for their answers."""
        self._readings = [each for each in self._readings if not each.request.is_given_up]
        taken = sum(not row.is_over for row in self._rows)
        taken += sum(each.request.answers for each in self._readings)
        with self._changed:
            while self._waiting:
                request = self._waiting[0]
                if not request.is_given_up:
                    taken += request.answers
                    if taken > self.limits.rows:
                        return
                    self._readings.append(_Reading(request, self.cache.root))
                self._waiting.popleft()

    def _read_prompts(self) -> None:
        """Reads a piece of as many prompts as there is time for, all at once."""
        pieces = self._pieces()
        if not pieces:
            return
        texts = [each.request.prompt[each.position : each.position + n] for each, n in pieces]
        state = self.reader.join([each.state for each, _ in pieces])
        state = self.reader.advance(texts, state)
        for i, (each, length) in enumerate(pieces):
            is_kept = length == each.piece(self.limits.chunk)
            each.position += length
            each.state = self._row_of(state, i, len(pieces), each.position)
            self.counts.prompt_tokens += length
            if is_kept:
                since = each.request.prompt[each.node.length : each.position]
                each.node = self.cache.add(each.node, since, each.state)

    def _pieces(self) -> list[tuple[_Reading, int]]:
        """Which prompts are read in this step, and how many tokens of each.

        The oldest gets half of the tokens at least, so it never waits for ever; the others follow from the shortest
        on, so a long prompt holds up no short one. Of those that go on alike one is read, and the others go on from
        there.
        """
        for each in self._readings:
            self._skip(each)
        unread = [each for each in self._readings if each.left]
        if not unread:
            return []
        oldest, *others = unread
        room = self.limits.piece if self._rows else self.limits.chunk
        reserved = min(oldest.piece(self.limits.chunk), (room + 1) // 2)
        room -= reserved
        under_way = {oldest.until(self.limits.chunk)}
        pieces = []
        for each in sorted(others, key=lambda each: each.left):
            length = min(each.piece(self.limits.chunk), room)
            if length and (text := each.until(self.limits.chunk)) not in under_way:
                under_way.add(text)
                pieces.append((each, length))
                room -= length
        return [(oldest, min(oldest.piece(self.limits.chunk), reserved + room)), *pieces]

    def _skip(self, reading: _Reading) -> None:
        """Goes on from the last place of the text whose state is kept."""
        node = self.cache.find(reading.request.prompt[:-1])
        if node.length > reading.position:
            node = self.cache.load(node)
        skipped = node.length - reading.position
        if skipped > 0:
            reading.node, reading.state, reading.position = node, node.state, node.length
            reading.request.reused += skipped
            self.counts.reused_tokens += skipped

    def _row_of(self, state: State, i: int, rows: int, length: int) -> State:
        """The state of one of several texts, of so many tokens."""
        return state if rows == 1 else trim_rows(self.reader.select(state, [i]), length)

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

    def _settle(self) -> None:
        """Lets rows leave whose answer is over, and those join whose prompt is read."""
        self._keep_answers()
        stay = [i for i, row in enumerate(self._rows) if not row.is_over]
        read = [each for each in self._readings if not each.left]
        new = [(row, each.state) for each in read for row in each.rows() if not row.is_over]
        if new or len(stay) < len(self._rows):
            states = [state for _, state in new]
            if stay:
                are_all = len(stay) == len(self._rows)
                states.insert(0, self._state if are_all else self.reader.select(self._state, stay))
            self._rows = [*(self._rows[i] for i in stay), *(row for row, _ in new)]
            longest = max((row.length for row in self._rows), default=0)
            self._state = trim_rows(self.reader.join(states), longest) if states else None
        self._readings = [each for each in self._readings if each.left]

    def _keep_answers(self) -> None:
        """Keeps the state after each finished answer: the next turn of a conversation begins with it."""
        for i, row in enumerate(self._rows):
            if row.is_done:
                read = (*row.request.prompt, *row.tokens)[row.node.length : row.length]
                alone = self._row_of(self._state, i, len(self._rows), row.length)
                self.cache.add(row.node, read, alone)

    def _fail(self) -> None:
        """Ends everything under way with an error."""
        taken = {row.request for row in self._rows} | {each.request for each in self._readings}
        self._rows, self._state, self._readings = [], None, []
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
