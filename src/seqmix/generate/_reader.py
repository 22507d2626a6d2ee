"""A language model as a function: tokens and a state go in, logits and the state after them come out.

Decoding is written against `Reader` alone. States are values: reading leaves the one that it was given as it was, so
a guess that was wrong is taken back by going on from an earlier state, whatever the state is made of.

Axes: N rows, T time, K tokens that are kept, V vocabulary, D width.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, cat, tensor

from seqmix.core.errors import ConfigError
from seqmix.core.state import State, select_rows
from seqmix.core.tree import Tree
from seqmix.models._halves import KnownBlocks
from seqmix.models.hf import SeqmixForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reading(NamedTuple):
    """What reading gives: logits [N, K, V] of the last tokens, features [N, T, D] of all, and the state after them."""

    logits: Tensor
    features: Tensor
    state: State


class Reader(ABC):
    """Reads tokens; made by `reader_of`."""

    @abstractmethod
    def read(self, ids: Tensor, state: State = None, *, keep: int = 1) -> Reading:
        """Reads ids [N, T] after `state`; logits are those of the last `keep` tokens, of all if 0."""

    @abstractmethod
    def select(self, state: State, rows: list[int]) -> State:
        """These rows of the state, in this order; a row may repeat."""

    def read_tree(self, ids: Tensor, state: State, tree: Tree) -> Reading:
        """Reads ids [1, n + T]: n tokens of a text, and then the nodes of a tree of tokens that may follow them.

        Logits [1, 1 + T, V] are of the last of the n tokens and of the nodes, features [1, n + T, D] of all, each node
        read after the path to it; the state is the one after the n tokens. In general every path is read as a text of
        its own.
        """
        text, nodes = ids.tensor_split([ids.shape[1] - len(tree)], dim=1)
        first = self.read(text, state)
        branches = self.select(first.state, [0] * len(tree.paths))
        read = self.read(nodes[0, tree.paths], branches, keep=0)
        logits, features = (
            cat([whole, paths[tree.rows, tree.depths].unsqueeze(0)], dim=1)
            for whole, paths in zip(first[:2], read[:2], strict=True)
        )
        return Reading(logits, features, first.state)


def reader_of(model: PreTrainedModel | Reader) -> Reader:
    """The reader of a causal language model, one of seqmix or of transformers."""
    if isinstance(model, Reader):
        return model
    return _Own(model) if isinstance(model, SeqmixForCausalLM) else _Foreign(model)


class _Own(Reader):
    """A model of seqmix, whose states are values already. Its blocks are looked at once, so each text has its own."""

    def __init__(self, model: SeqmixForCausalLM) -> None:
        self.known = KnownBlocks()
        self.inside = model.model

    def read(self, ids: Tensor, state: State = None, *, keep: int = 1) -> Reading:
        ids = ids.to(self.inside.embedding.weight.device)
        embedded = self.inside.embedding(ids)
        features, state = self.inside.backbone(embedded, state, known=self.known)
        return Reading(self.inside.logits(features[:, -keep:]), features, state)

    def read_tree(self, ids: Tensor, state: State, tree: Tree) -> Reading:
        ids = ids.to(self.inside.embedding.weight.device)
        features, state = self.inside.backbone(self.inside.embedding(ids), state, tree=tree)
        return Reading(self.inside.logits(features[:, -len(tree) - 1 :]), features, state)

    def select(self, state: State, rows: list[int]) -> State:
        return select_rows(state, rows)


class _Foreign(Reader):
    """A model of transformers. Its cache is changed by reading, so it is a copy that reading changes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        names = inspect.signature(model.forward).parameters
        self.cache = "past_key_values" if "past_key_values" in names else "cache_params"
        self.cuts = "logits_to_keep" in names
        if self.cache not in names:
            raise ConfigError(
                f"{type(model).__name__} takes no cache, so decoding cannot go on from what it has read. Convert it "
                "with seqmix.convert, or use its own `generate`."
            )

    def read(self, ids: Tensor, state: State = None, *, keep: int = 1) -> Reading:
        if state is None or ids.shape[1] == 1 or _continues(state):
            return self._read(ids, state, keep)
        parts = []
        for column in ids.split(1, dim=1):
            parts.append(self._read(column, state, 1))
            state = parts[-1].state
        logits, features = (cat([part[i] for part in parts], dim=1) for i in (0, 1))
        return Reading(logits[:, -keep:], features, state)

    def _read(self, ids: Tensor, state: State, keep: int) -> Reading:
        options: dict[str, Any] = {self.cache: _copied(state)}
        if self.cuts:
            options["logits_to_keep"] = keep
        output = self.model(
            input_ids=ids.to(self.model.device),
            use_cache=True,
            output_hidden_states=True,
            **options,
        )
        return Reading(output.logits[:, -keep:], output.hidden_states[-1], output[self.cache])

    def select(self, state: State, rows: list[int]) -> State:
        state = _copied(state)
        state.reorder_cache(tensor(rows, device=self.model.device))
        return state


def _continues(cache: Any) -> bool:
    """Whether several tokens can be read at once after this cache.

    Recurrent models of transformers start anew there, or forget the history of their convolutions, so their tokens are
    read one by one.
    """
    return type(cache).__name__ == "DynamicCache" and not any(
        hasattr(layer, "conv_states") for layer in cache.layers
    )


def _copied(cache: Any) -> Any:
    """A cache that can be written to without changing `cache`.

    Layers replace keys and values by longer ones, so those can be shared; recurrent states, which they keep in dicts
    and lists, are written in place.
    """
    if cache is None:
        return None
    if type(cache).__name__ != "DynamicCache":
        return copy.deepcopy(cache)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in other.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict | list):
                setattr(layer, name, copy.deepcopy(value))
    return other
