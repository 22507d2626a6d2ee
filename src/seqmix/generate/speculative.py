"""Speculative decoding: a drafter guesses some tokens, the model reads them at once and keeps what it agrees with.

    accept a guess x ~ q with probability min(1, p(x) / q(x));
    at the first that is not, draw from max(p - q, 0) / sum; after the last, draw from p

p is what the model would draw the token from, so texts have the distribution of plain decoding, and at temperature 0
they are the same tokens. Leviathan et al. 2022 (arXiv:2211.17192), algorithm 1.

Refused guesses must leave no trace, and a recurrence or a convolution cannot be run backwards. States are values here:
the model goes on from the state before the guesses, and the tokens that were accepted since are read again, in front of
the next guesses. So no state is kept per token, and there is one way for all mixers.

Axes: T time, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.generate._method import Continuation, Method, Task, at_least
from seqmix.generate._reader import Reader, reader_of
from seqmix.generate.sampling import GREEDY, Sampling, draw, random_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNREAD = 8  # accepted tokens that the model may have to read again


class Guess(NamedTuple):
    """A token, and what it was drawn from: probabilities [V], or None if it was certain."""

    token: int
    chances: Tensor | None


class Draft(ABC):
    """The drafter of one text."""

    @abstractmethod
    def guess(
        self, written: list[int], count: int, sampling: Sampling, source: torch.Generator
    ) -> list[Guess]:
        """At most `count` tokens that may follow the new tokens `written`, which only grow from call to call."""


class Drafter(ABC):
    """Guesses tokens."""

    @abstractmethod
    def start(self, task: Task) -> Draft:
        """The drafter of one text of this task."""


class DraftModel(Drafter):
    """Another causal language model with the same tokens, such as a smaller one or a sub-network."""

    def __init__(self, model: PreTrainedModel | Reader) -> None:
        self.model = model

    def start(self, task: Task) -> Draft:
        return _ModelDraft(reader_of(self.model), task)


class _ModelDraft(Draft):
    def __init__(self, reader: Reader, task: Task) -> None:
        self.reader, self.task = reader, task
        self.prompt = task.prompt[0].tolist()
        self.state = None  # after the first `seen` tokens of prompt and text
        self.seen = 0

    def guess(
        self, written: list[int], count: int, sampling: Sampling, source: torch.Generator
    ) -> list[Guess]:
        text = self.prompt + written
        new = torch.tensor([text[self.seen :]])
        logits, _, self.state = self.reader.read(new, self.state)
        self.seen = len(text)
        ahead, state = list(written), self.state
        guesses: list[Guess] = []
        while True:
            last = self.task.allowed(logits[:, -1], [ahead])
            chances = sampling.probabilities(last, self.prompt, [ahead])[0]
            guesses.append(Guess(draw(chances, source), chances))
            ahead.append(guesses[-1].token)
            if len(guesses) == count or self.task.is_finished(ahead):
                return guesses
            logits, _, state = self.reader.read(torch.tensor([ahead[-1:]]), state)


class PromptLookup(Drafter):
    """The tokens that followed when the last few were there before, in prompt or text; costs nothing.

    It looks for the last `longest` tokens, then for fewer, at the latest place. Saxena 2023, prompt lookup decoding.
    """

    def __init__(self, longest: int = 3) -> None:
        at_least("longest", longest, 1)
        self.longest = longest

    def start(self, task: Task) -> Draft:
        return _LookupDraft(self.longest, task.prompt[0].tolist())


class _LookupDraft(Draft):
    def __init__(self, longest: int, prompt: list[int]) -> None:
        self.longest, self.prompt = longest, prompt

    def guess(
        self, written: list[int], count: int, sampling: Sampling, source: torch.Generator
    ) -> list[Guess]:
        text = self.prompt + written
        for length in range(min(self.longest, len(text) - 1), 0, -1):
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] == text[-length:]:
                    following = text[start + length : start + length + count]
                    return [Guess(token, None) for token in following]
        return []


@dataclass(frozen=True)
class Speculated(Continuation):
    """A continuation, and how often the model checked guesses for it."""

    checks: int


@dataclass(frozen=True, kw_only=True)
class Speculative(Method):
    """Decodes as `sampling` does, checking `guesses` tokens of the drafter at a time."""

    drafter: Drafter
    guesses: int = 4
    sampling: Sampling = GREEDY

    def __post_init__(self) -> None:
        at_least("guesses", self.guesses, 1)

    def decode(self, reader: Reader, task: Task) -> list[Continuation]:
        """`texts` continuations, one after another, with random numbers of their own."""
        return [self._text(reader, task, task.seed + place) for place in range(task.texts)]

    def _text(self, reader: Reader, task: Task, seed: int) -> Speculated:
        prompt = task.prompt[0].tolist()
        draft, source = self.drafter.start(task), random_numbers(seed)
        written: list[int] = []
        likelihood, checks = 0.0, 0
        state, done = None, len(prompt) - 1  # the model has read this much of prompt and text
        if done:
            state = reader.read(task.prompt[:, :done]).state
        while True:
            room = task.new_tokens - len(written) - 1  # the model adds a token of its own
            count = min(self.guesses, room)
            guesses = draft.guess(written, count, self.sampling, source) if count else []
            unread = (prompt + written)[done:] + [guess.token for guess in guesses]
            logits, _, after = reader.read(torch.tensor([unread]), state, keep=len(guesses) + 1)
            checks += 1
            for place in range(len(guesses) + 1):
                last = task.allowed(logits[:, place], [written])
                chances = self.sampling.probabilities(last, prompt, [written])[0]
                guess = guesses[place] if place < len(guesses) else None
                token = _verified(chances, guess, source)
                written.append(token)
                likelihood += float(last[0].float().log_softmax(-1)[token])
                if task.emit is not None:
                    task.emit(token)
                if task.is_finished(written):
                    return Speculated(written, likelihood, task.is_ended(written), checks)
                if guess is None:
                    state, done = after, len(prompt) + len(written) - 1  # all were right
                elif token != guess.token:
                    break
            if len(prompt) + len(written) - done > UNREAD:
                again = torch.tensor([(prompt + written)[done:-1]])
                state, done = reader.read(again, state).state, len(prompt) + len(written) - 1


def _verified(chances: Tensor, guess: Guess | None, source: torch.Generator) -> int:
    """The guess where it is accepted, or a token instead of it; without a guess a draw from `chances` [V]."""
    if guess is None:
        return draw(chances, source)
    guessed = guess.chances
    if guessed is None:
        guessed = torch.zeros_like(chances).index_fill_(
            0, torch.tensor([guess.token], device=chances.device), 1.0
        )
    if guessed.shape != chances.shape:
        raise ConfigError(
            f"The drafter has {len(guessed)} tokens and the model {len(chances)}. Give a drafter with the model's "
            "tokenizer."
        )
    ratio = float(chances[guess.token] / guessed[guess.token])
    if float(torch.rand((), generator=source, dtype=torch.float64)) < ratio:
        return guess.token
    return draw((chances - guessed).clamp_min(0), source)
