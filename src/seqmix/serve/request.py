"""What is asked of an engine, and what it tells in return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from seqmix.core.errors import SeqmixError
from seqmix.generate import Constraint
from seqmix.generate.sampling import Sampling

BODY_BYTES = 4 << 20  # of an HTTP request, by default


class QueueFull(SeqmixError):
    """As many requests wait as may wait; the same request may succeed later."""


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
