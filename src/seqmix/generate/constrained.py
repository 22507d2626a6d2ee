"""Constrained generation: texts of a regular expression, of a JSON schema, or among given ones.

    p(v | x, y)  ->  p(v | x, y) [y v begins a text of the language] / sum

The automata over tokens are those of llguidance. A token is judged by its bytes, so the language holds for the text
whatever tokens it is made of. Every method of the package decodes under a constraint, for the constraint is part of
the task. A text that is cut off after `new_tokens` is only a beginning; its `is_ended` says so.
"""

from __future__ import annotations

import json
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqmix.core import extras
from seqmix.core.errors import ConfigError, DataError
from seqmix.generate._method import Constraint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGINNINGS = 256  # automata kept, one per beginning of a text
LONGEST = 1 << 18  # characters of a grammar


class Language(ABC):
    """A set of texts, which a tokenizer turns into a constraint on tokens."""

    @abstractmethod
    def grammar(self) -> str:
        """The grammar, as llguidance reads it."""

    def constraint(self, tokenizer: PreTrainedTokenizerBase) -> Constraint:
        """The constraint on the tokens of `tokenizer`.

        Raises:
            DataError: for a pattern or schema that is malformed, uses what is not supported, or fits no text.
            ConfigError: for a tokenizer that the automata cannot be made from.
        """
        grammar = self.grammar()
        if len(grammar) > LONGEST:
            raise DataError(
                f"{type(self).__name__}: {len(grammar)} characters of grammar, wanted at most {LONGEST}."
            )
        return _Automaton(grammar, _tokens(tokenizer), type(self).__name__)


@dataclass(frozen=True)
class Pattern(Language):
    """Texts that match a regular expression as a whole; it has no look-around and no back-references."""

    pattern: str

    def grammar(self) -> str:
        return _library().LLMatcher.grammar_from_regex(self.pattern)


@dataclass(frozen=True)
class JsonSchema(Language):
    """JSON texts that are valid under a schema, with a blank after commas and colons and none elsewhere."""

    schema: Mapping[str, Any]

    def grammar(self) -> str:
        spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            text = json.dumps(self.schema)
            return _library().LLMatcher.grammar_from_json_schema(text, spaces)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"JsonSchema: this is no JSON schema ({error}).") from None


@dataclass(frozen=True)
class Choice(Language):
    """One of the given texts."""

    texts: Sequence[str]

    def grammar(self) -> str:
        if isinstance(self.texts, str) or not self.texts or not all(self.texts):
            raise DataError(f"Choice: {self.texts!r}, wanted a list of texts that are not empty.")
        return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in self.texts)


class _Automaton(Constraint):
    """A language over tokens. The automata after the latest beginnings are kept, and never changed."""

    def __init__(self, grammar: str, tokens: Any, name: str) -> None:
        self.name = name
        self.own_ends = list(tokens.eos_tokens)
        start = _library().LLMatcher(tokens, grammar, log_level=0)
        self.kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._check(start)
        self.start = start
        if not self._following(start).any() and not start.is_accepting():
            raise DataError(f"{name}: it fits no text. Change the pattern or schema.")

    def allowed(self, ids: list[int], vocabulary: int, ends: frozenset[int]) -> Tensor:
        after = self._after(tuple(ids))
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        following = self._following(after)[:vocabulary]
        mask[: len(following)] = following
        mask[sorted(ends)] = after.is_accepting()
        return mask

    def is_over(self, ids: list[int]) -> bool:
        after = self._after(tuple(ids))
        return after.is_accepting() and not bool(self._following(after).any())

    def _following(self, after: Any) -> Tensor:
        """The tokens that may follow, as bool, but for those that end a text."""
        following = torch.frombuffer(bytearray(after.compute_logit_bias()), dtype=torch.uint8) > 0
        self._check(after)
        following[self.own_ends] = False
        return following

    def _after(self, ids: tuple[int, ...]) -> Any:
        known = len(ids)
        while known and ids[:known] not in self.kept:
            known -= 1
        after = self.kept[ids[:known]] if known else self.start
        if known < len(ids):
            after = after.deep_copy()
            if not after.consume_tokens(list(ids[known:])):
                self._check(after)
                raise DataError(f"{self.name}: the tokens {list(ids)} begin no text of it.")
            self.kept[ids] = after
            if len(self.kept) > BEGINNINGS:
                self.kept.popitem(last=False)
        return after

    def _check(self, after: Any) -> None:
        if after.is_error() and (reason := after.get_error()):
            line = " ".join(reason.split())
            raise DataError(f"{self.name}: {line[:300]}")


def _library() -> Any:
    return extras.require("llguidance", extra="generate")


_made: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _tokens(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer as llguidance knows it; made once, for it takes a second where there are many tokens."""
    if tokenizer not in _made:
        _library()
        from llguidance.hf import from_tokenizer

        try:
            _made[tokenizer] = from_tokenizer(tokenizer)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"A constraint needs a fast tokenizer with an end-of-text token, not this "
                f"{type(tokenizer).__name__} ({error})."
            ) from None
    return _made[tokenizer]
