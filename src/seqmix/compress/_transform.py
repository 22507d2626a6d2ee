"""What a transform is: a model and some text to a cheaper model.

A transform never changes the model that it is given, so steps can be undone and compared. What it found out on the
way (which layers went, which errors they made) it writes down as notes, and what took long it remembers, so that a
run that was stopped goes on.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from seqmix.core.config import Config
from seqmix.core.errors import DataError
from seqmix.core.files import write_text
from seqmix.data.packing import pack
from seqmix.data.text import Corpus
from seqmix.data.tokenizer import encode
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.train.evaluation import backend_of, end_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a transform will take: tokens of text that it reads, forward and backward passes over them, memory.

    `forward_tokens` and `training_tokens` count tokens through the whole model without and with a backward pass;
    the time is predicted from them and from the measured speed of the model here. `memory_mb` comes on top of the
    model itself.
    """

    forward_tokens: int = 0
    training_tokens: int = 0
    memory_mb: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """The text that transforms may look at: windows of token ids [N, T], and the corpus that they are of.

    `teacher` is the model before all steps, for transforms that learn from its predictions. For a classifier, `labels`
    are the classes [N] of the windows.
    """

    windows: Tensor
    corpus: Corpus | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    teacher: SeqmixForCausalLM | None = None
    labels: Tensor | None = None

    @classmethod
    def of(
        cls,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int = 256,
        windows: int = 64,
        teacher: SeqmixForCausalLM | None = None,
    ) -> Self:
        """`windows` full windows of `length` tokens, evenly spread over the corpus.

        Raises `DataError` for a text without one full window.
        """
        eos = end_of_text(tokenizer)
        documents = encode(backend_of(tokenizer), corpus.documents)
        packed = pack(documents, length, eos=eos, pad=eos)
        full = packed.windows - 1  # the last one may hold pads
        if full < 1:
            raise DataError(
                f"{corpus.name} is shorter than two windows of {length} tokens. Give more text, or a shorter length."
            )
        chosen = torch.linspace(0, full - 1, min(windows, full)).round().long()
        return cls(
            windows=packed.batch(chosen.numpy())["input_ids"],
            corpus=corpus,
            tokenizer=tokenizer,
            teacher=teacher,
        )

    def first(self, tokens: int) -> Tensor:
        """As many windows [n, T] as hold at least `tokens` tokens, evenly spread; all where there are fewer."""
        return self.windows[self.rows(tokens)]

    def rows(self, tokens: int) -> Tensor:
        """The numbers [n] of the windows that `first` takes."""
        wanted = min(len(self.windows), max(1, -(-tokens // self.windows.shape[1])))
        return torch.linspace(0, len(self.windows) - 1, wanted).round().long()

    def with_at_least(self, tokens: int) -> Tensor:
        """Windows [n, T] of at least `tokens` tokens of the corpus; all of `windows` where it has no more to give."""
        if self.windows.numel() >= tokens or self.corpus is None or self.tokenizer is None:
            return self.windows
        length = self.windows.shape[1]
        more = self.of(self.corpus, self.tokenizer, length=length, windows=-(-tokens // length))
        return max(more.windows, self.windows, key=len)


@dataclass(eq=False)
class Work:
    """Where a transform keeps what it has computed, and whom it tells how far it is."""

    folder: Path | None = None  # for what a stopped run goes on from
    shown: bool = False  # progress on stderr
    notes: dict[str, Any] = field(default_factory=dict)  # what the report says about this step

    def remember(self, name: str, measure: Callable[[], Any]) -> Any:
        """The JSON value of `measure()`, taken from `folder` where an earlier start has measured it."""
        if self.folder is None:
            return measure()
        path = self.folder / "memory.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if name not in known:
            known[name] = measure()
            write_text(path, json.dumps(known))
        return json.loads(json.dumps(known[name]))

    def track(
        self, items: Iterable[Any], description: str, total: int | None = None
    ) -> Iterator[Any]:
        """The items, with a progress bar where it is shown."""
        bar = Progress(console=Console(stderr=True), disable=not self.shown, transient=True)
        with bar:
            yield from bar.track(items, total=total, description=description)


@dataclass(frozen=True, kw_only=True)
class Transform(Config, ABC):
    """One way to make a model cheaper. The fields are its options; `NAME:VALUE` in a recipe sets the first.

    `quick` are options under which the laws of `seqmix.testing` try it on small models. `grows` says why a model may
    take more room afterwards, where it may. `amount` names the option of how much goes, where what `fit` remembers
    holds for every amount.
    """

    quick: ClassVar[Mapping[str, Any]] = {}
    amount: ClassVar[str | None] = None
    grows: ClassVar[str | None] = None

    @abstractmethod
    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        """The cheaper model; `model` stays as it was. Raises `ConfigError` where it cannot be applied to `model`."""

    @abstractmethod
    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        """What `fit` will take, said before it starts."""

    @property
    def whatever_amount(self) -> Self:
        """This transform with the amount left at its default: the same for all that can share what they remember."""
        if self.amount is None:
            return self
        return replace(self, **{self.amount: getattr(type(self)(), self.amount)})

    @property
    def name(self) -> str:
        """The name of the file in this folder."""
        return type(self).__module__.rpartition(".")[2]
