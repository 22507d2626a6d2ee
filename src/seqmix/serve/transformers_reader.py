"""Models of transformers that this package has no blocks for, read with their own caches.

Their caches hold texts of one length, so every text has a cache of its own and is read by itself. A cache is kept as
a state, a value like those of this package's models: the keys and values of attention grow with the text, everything
else (recurrent states, histories of convolutions, windows) is a tensor. So prefixes are shared and saved alike.

Some recurrent models of transformers give wrong logits when several tokens come after a cache, for they start anew
or forget the history of their convolutions. Whether a model does is tried out; if so, its tokens are read one by one.

Axes: B rows, T time, H heads, K key width, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from seqmix.convert.accelerate import accelerate
from seqmix.core.errors import ConfigError
from seqmix.core.state import Growing, State
from seqmix.serve.reader import Texts

TRIED = 24  # tokens of the trial, and a third as many after them


class TransformersReader:
    """A causal language model of transformers, accelerated. A state is a list with one entry per text.

    `goes_on` says whether several tokens may be read at once after others.
    Raises `ConfigError` for a model whose cache cannot be kept.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.vocabulary = model.config.get_text_config().vocab_size
        names = inspect.signature(model.forward).parameters
        self._cache_name = "past_key_values" if "past_key_values" in names else "cache_params"
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        if self._cache_name not in names:
            raise self._refusal("takes no cache")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is to be replaced
            self.acceleration = accelerate(model)
        self._blank = self._step([0], None)[1]
        if type(self._blank).__name__ != "DynamicCache":
            raise self._refusal(f"has a {type(self._blank).__name__}")
        self.goes_on = self._try()

    @torch.inference_mode()
    def read(self, texts: Texts, state: State) -> tuple[Tensor, State]:
        befores = state or [None] * len(texts)
        read = [self._read(text, before) for text, before in zip(texts, befores, strict=True)]
        return torch.cat([logits for logits, _ in read]), [after for _, after in read]

    def advance(self, texts: Texts, state: State) -> State:
        return self.read(texts, state)[1]

    def join(self, states: Sequence[State]) -> State:
        return [text for state in states for text in state or [None]]

    def select(self, state: State, rows: Sequence[int]) -> State:
        return [state[row] for row in rows]

    def _read(self, tokens: Sequence[int], state: State) -> tuple[Tensor, State]:
        """The tokens of one text after its state, to logits [1, V] and the state after them."""
        cache = None if state is None else self._cache_of(state)
        length = len(tokens) + (0 if state is None else int(state["length"]))
        at_once = cache is None or self.goes_on
        for piece in [tokens] if at_once else [[token] for token in tokens]:
            logits, cache = self._step(piece, cache)
        return logits, self._state_of(cache, length)

    @torch.inference_mode()
    def _step(self, tokens: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
        ids = torch.tensor([tokens], device=self.model.device)
        given = {self._cache_name: cache, **self._options}
        output = self.model(input_ids=ids, use_cache=True, **given)
        return output.logits[:, -1].cpu(), output[self._cache_name]

    def _try(self) -> bool:
        """Whether several tokens may follow a cache; raises where the cache is not what its state says."""
        numbers = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocabulary, (TRIED + TRIED // 3,), generator=numbers).tolist()
        first, more = tokens[:TRIED], tokens[TRIED:]
        whole, _ = self._step(tokens, None)
        state = self._state_of(self._step(first, None)[1], TRIED)
        several, _ = self._step(more, self._cache_of(state))
        kept, ended = self._cache_of(state), self._step(first, None)[1]
        for token in more:
            logits, kept = self._step([token], kept)
            wanted, ended = self._step([token], ended)
        if not torch.equal(logits, wanted):
            raise self._refusal("has a cache with parts of an unknown kind")
        rounding = (logits - whole).abs().max() + torch.finfo(logits.dtype).eps * whole.abs().max()
        return bool((several - whole).abs().max() <= 4 * rounding)

    def _state_of(self, cache: Any, length: int) -> State:
        layers = [
            {
                name: kept
                for name, value in vars(layer).items()
                if (kept := _kept(name, value, layer)) is not None
            }
            for layer in cache.layers
        ]
        return {"length": torch.tensor([length]), "layers": layers}

    def _cache_of(self, state: State) -> Any:
        """A cache that reading may change without changing the state."""
        cache = copy.copy(self._blank)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer, values in zip(cache.layers, state["layers"], strict=True):
            for name, value in values.items():
                if isinstance(value, Growing):  # reading appends to a copy
                    setattr(layer, name, value.tensor.transpose(1, 2))
                elif isinstance(value, Tensor):
                    setattr(layer, name, value.clone())
            for name, value in vars(layer).items():
                if isinstance(value, dict):
                    kept = {int(k): tensor.clone() for k, tensor in values.get(name, {}).items()}
                    setattr(layer, name, value | kept)
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = int(state["length"])
        return cache

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(
            f"{type(self.model).__name__} {why}, so its states cannot be kept and it cannot be served."
        )


def _kept(name: str, value: Any, layer: Any) -> State:
    """What a state holds of an attribute of a cache's layer; None if nothing.

    Keys and values are [B, H, T, K] and grow, but for those of a window.
    """
    if isinstance(value, Tensor):
        grows = name in ("keys", "values") and not hasattr(layer, "sliding_window")
        return Growing(value.transpose(1, 2)) if grows else value
    if isinstance(value, dict):
        return {str(k): tensor for k, tensor in value.items() if isinstance(tensor, Tensor)} or None
    return None
