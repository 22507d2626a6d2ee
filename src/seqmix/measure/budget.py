"""Budgets such as `decode_ms<2@8192, memory_mb<400`: what a model may cost and must reach.

budget = term {"," term}        term = METRIC ("<" | "<=" | ">" | ">=") NUMBER ["x" | "@" CONTEXT]

`latency<0.6x` is relative to an original; only budgets of `seqmix compress` have one.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from seqmix.core.errors import BudgetError

METRICS = {
    "bits_per_byte": "validation loss in bits per byte of text",
    "perplexity": "validation perplexity per token",
    "loss": "validation loss in nats per token",
    "parameters": "number of parameters",
    "memory_mb": "peak memory of reading the longest context and decoding, beyond the imports, in MiB",
    "train_memory_mb": "peak memory of training, beyond the imports, in MiB",
    "state_mb": "memory of the state of one text, in MiB (@context)",
    "decode_ms": "milliseconds per decoded token (@context)",
    "prefill_tokens_s": "tokens read per second (@context)",
    "train_tokens_s": "training tokens per second",
    "train_seconds": "seconds of training",
}
BY_CONTEXT = ("state_mb", "decode_ms", "prefill_tokens_s")
RELATIONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RELATION = re.compile(r"<=|>=|<|>")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?")
_CONTEXT = re.compile(r"[0-9]+")
_SHARE = re.compile(r"x\b")


@dataclass(frozen=True)
class Term:
    """One condition; `context` None stands for the longest context that was measured.

    The figures of a `relative` one are shares of an original's.
    """

    metric: str
    relation: str
    limit: float
    context: int | None = None
    relative: bool = False

    def __str__(self) -> str:
        place = "" if self.context is None else f"@{self.context}"
        return f"{self.metric}{self.relation}{self.limit:g}{'x' if self.relative else ''}{place}"

    def value(self, figures: Mapping[str, Any]) -> float:
        """The figure that this term is about; metrics with a context are mappings from context."""
        figure = figures[self.metric]
        if not isinstance(figure, Mapping):
            return float(figure)
        context = str(self.context or max(int(c) for c in figure))
        return float(figure[context])

    def holds(self, figures: Mapping[str, Any]) -> bool:
        return bool(RELATIONS[self.relation](self.value(figures), self.limit))

    def excess(self, figures: Mapping[str, Any]) -> float:
        """How far the term is missed, relative to its limit; 0 where it holds."""
        if self.holds(figures):
            return 0.0
        return abs(self.value(figures) - self.limit) / max(abs(self.limit), 1e-12)


def parse_budget(
    text: str | None,
    metrics: Mapping[str, str] = METRICS,
    by_context: Sequence[str] = BY_CONTEXT,
    *,
    relative: bool = False,
) -> tuple[Term, ...]:
    """The terms of a budget; none for None or blanks. Raises `BudgetError` with a caret at the fault.

    `metrics` are the known ones with their meanings, `by_context` those that may name a context; `relative` says
    whether there is an original to which limits such as `0.6x` can refer.
    """
    if text is None or not text.strip():
        return ()
    return _Reader(text, metrics, by_context, relative).budget()


def contexts_of(terms: Sequence[Term]) -> list[int]:
    """The contexts that the terms name."""
    return sorted({term.context for term in terms if term.context is not None})


class _Reader:
    def __init__(
        self, text: str, metrics: Mapping[str, str], by_context: Sequence[str], relative: bool
    ) -> None:
        self.text = text
        self.metrics, self.by_context, self.relative = metrics, by_context, relative
        self.place = 0

    def fail(self, message: str, place: int | None = None) -> NoReturn:
        place = self.place if place is None else place
        metrics = "\n".join(f"  {name:<17} {meaning}" for name, meaning in self.metrics.items())
        example = "latency<0.6x (relative to the original)" if self.relative else "decode_ms<2@8192"
        context = ", and @CONTEXT where it has one" if self.by_context else ""
        raise BudgetError(
            f"The budget does not parse at column {place + 1}: {message}\n"
            f"  {self.text}\n  {' ' * place}^\n"
            f"A term is a metric, one of {' '.join(RELATIONS)} and a number{context}, such as {example}. "
            f"Metrics:\n{metrics}"
        )

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        while self.place < len(self.text) and self.text[self.place].isspace():
            self.place += 1
        found = pattern.match(self.text, self.place)
        if found:
            self.place = found.end()
        return found

    def budget(self) -> tuple[Term, ...]:
        terms = [self.term()]
        while self.match(re.compile(",")):
            terms.append(self.term())
        if not self.match(re.compile(r"\Z")):
            self.fail("expected ',' or the end.")
        return tuple(terms)

    def term(self) -> Term:
        name = self.match(_NAME)
        if not name:
            self.fail("expected the name of a metric.")
        metric = name[0]
        if metric not in self.metrics:
            close = difflib.get_close_matches(metric, self.metrics, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            self.fail(f"there is no metric {metric!r}.{hint}", name.start())
        relation = self.match(_RELATION)
        if not relation:
            self.fail(f"expected one of {' '.join(RELATIONS)} after {metric}.")
        number = self.match(_NUMBER)
        if not number:
            self.fail("expected a number.")
        is_share = self.relative and self.match(_SHARE) is not None
        return Term(metric, relation[0], float(number[0]), self.context(metric), is_share)

    def context(self, metric: str) -> int | None:
        if not self.match(re.compile("@")):
            return None
        if metric not in self.by_context:
            having = ", ".join(self.by_context)
            which = f"only {having} have one" if having else "none of these metrics has one"
            self.fail(f"{metric} has no context; {which}.", self.place - 1)
        found = self.match(_CONTEXT)
        if not found or int(found[0]) < 1:
            self.fail("expected a context in tokens, such as 8192.")
        return int(found[0])
