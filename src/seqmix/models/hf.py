"""Language models behind the interfaces of Hugging Face transformers.

`save_pretrained`, `from_pretrained`, the Auto classes, `generate`, `Trainer` and PEFT work on every layout.
Importing this module registers the classes with `AutoConfig` and
`AutoModelForCausalLM`; `import seqmix` arranges that it is imported with transformers.

Axes: B rows, T time, D width, N texts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from seqmix.core.errors import ConfigError, DataError, ShapeError
from seqmix.core.state import State, num_rows
from seqmix.data.packing import IGNORED, cu_seqlens_from_segments
from seqmix.models._hf_model import SeqmixConfig, SeqmixModel, new_columns, read
from seqmix.models.backbone import ModelSpec
from seqmix.models.pretrained import load
from seqmix.models.state_cache import StateCache

__all__ = ["SeqmixConfig", "SeqmixForCausalLM", "SeqmixModel", "StateCache", "create", "load"]


class SeqmixForCausalLM(SeqmixModel, GenerationMixin):
    """A `LanguageModel` with the interfaces of transformers; `forward` describes the inputs."""

    def __init__(self, config: SeqmixConfig) -> None:
        super().__init__(config)
        entries = config.to_spec().entries()
        mixers = [block.mixer for block in self.model.backbone.blocks]
        for mixer, entry in zip(mixers, entries, strict=True):
            if mixer is not None and not (mixer.causal or mixer.reads_prefix):
                raise ConfigError(
                    f"{entry.mixer.name} reads the future, so it cannot predict the next token. "
                    "Use a causal mixer in a language model."
                )
        self._is_causal = all(mixer is None or mixer.causal for mixer in mixers)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        segments: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Tensor,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, vocabulary] of the next tokens; with labels also the mean cross-entropy, in nats.

        Args:
            input_ids: token ids [B, T]; or `inputs_embeds` [B, T, D].
            attention_mask: [B, T], or [B, length + T] after a cache; 0 marks pads, wherever they are. Their
                logits are those of zero features and mean nothing.
            past_key_values: the cache of an earlier call, to continue from; it is brought up to date.
            labels: [B, T], under their own tokens: position t is scored against label t + 1. -100 is not
                scored, nor are pads and the first token of each text.
            use_cache: whether to return a cache; by default outside training.
            segments: [B, T], a number per document; nothing passes from one document to the next.
            cu_seqlens: boundaries [N+1] of N texts in one row (B = 1); the state has N rows.
            num_items_in_batch: what the summed loss is divided by (gradient accumulation), instead of
                the number of scored labels.
            logits_to_keep: only the logits of so many last positions.
            shift_labels (among `options`): [B, T] instead of labels: position t is scored against label t.

        Raises:
            ShapeError, ConfigError: for inputs that do not go together.
        """
        # Not a named parameter: the Trainer takes every name with "label" for one that batches must have.
        shift_labels = options.pop("shift_labels", None)
        if unknown := sorted(name for name, value in options.items() if value is not None):
            raise ConfigError(
                f"{', '.join(unknown)}: not an input of a seqmix model. Positions and boundaries follow from "
                "attention_mask, segments or cu_seqlens."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("Give exactly one of input_ids and inputs_embeds.")
        if output_attentions or output_hidden_states:
            raise ConfigError(
                "output_attentions and output_hidden_states: seqmix models return neither."
            )
        cache = self._cache(past_key_values)
        x = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        mask = new_columns(attention_mask, batch, length, cache.length)
        if segments is not None:
            if cu_seqlens is not None or mask is not None or cache.state is not None:
                raise ConfigError(
                    "segments go with no attention_mask, cu_seqlens or past_key_values."
                )
            cu_seqlens = cu_seqlens_from_segments(segments)
            if len(cu_seqlens) - 1 == batch:
                cu_seqlens = None  # every row is one document
        elif cu_seqlens is not None and mask is not None:
            raise ConfigError("cu_seqlens leave no room for pads: leave out attention_mask.")
        rows = batch if segments is not None or cu_seqlens is None else len(cu_seqlens) - 1
        if num_rows(cache.state) not in (0, rows):
            raise ShapeError(
                f"past_key_values has {num_rows(cache.state)} rows, but the input has {rows}. Repeat them "
                "with batch_repeat_interleave, or choose some with batch_select_indices."
            )

        before = cache.state
        features, state = read(self.model.backbone, x, before, mask, cu_seqlens)
        if use_cache or (use_cache is None and not self.training):
            cache.advance(state, length, lambda n: self._replay(x, before, mask, n))
        else:
            cache = None
        scored = labels is not None or shift_labels is not None
        if scored and before is None and not self._is_causal:
            raise ConfigError(
                "labels: in a prefix every token sees the next one, so nothing is left to predict. Read the "
                "prefix without labels, and give them with what follows it and its past_key_values."
            )
        if not scored:
            features = _kept(features, logits_to_keep)
        logits = self.model.logits(features)
        loss = None
        if scored:
            labels, shift_labels = _scored(labels, shift_labels, mask, cu_seqlens)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                ignore_index=IGNORED,
                shift_labels=shift_labels,
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def _replay(self, x: Tensor, before: State, mask: Tensor | None, columns: int) -> State:
        mask = None if mask is None else mask[:, :columns]
        return read(self.model.backbone, x[:, :columns], before, mask, None)[1]

    def _cache(self, past: Any) -> StateCache:
        if past is None:
            return StateCache()
        if not isinstance(past, StateCache):
            raise ConfigError(
                f"past_key_values is a {type(past).__name__}, wanted a seqmix StateCache: leave it out, or "
                "pass what an earlier call returned."
            )
        return past

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: StateCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` gets at one step of `generate`: the tokens that the cache has not read yet."""
        embedded = inputs_embeds is not None and is_first_iteration
        source = inputs_embeds if embedded else input_ids
        if next_sequence_length is not None:
            if next_sequence_length < 1:
                raise ShapeError(
                    f"past_key_values has read {self._cache(past_key_values).length} tokens and input_ids "
                    f"has only {source.shape[1]}. Give the whole text from its start, or with new tokens "
                    "alone an attention_mask [B, tokens read + tokens given]."
                )
            source = source[:, -next_sequence_length:]
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise DataError(
                "generate continues texts at their end, so pads belong on the left: "
                "tokenizer.padding_side = 'left'."
            )
        inputs = {"inputs_embeds" if embedded else "input_ids": source}
        passed = {name: kwargs[name] for name in ("use_cache", "logits_to_keep") if name in kwargs}
        return (
            inputs | passed | {"past_key_values": past_key_values, "attention_mask": attention_mask}
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ConfigError(
                f"cache_implementation={generation_config.cache_implementation!r}: a seqmix model has one "
                "kind of state. Leave it out."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = StateCache()
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()


def _scored(
    labels: Tensor | None,
    shift_labels: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Labels without those of pads and of tokens that no token of their own text comes before."""
    if mask is not None:
        if shift_labels is not None:
            # Beyond the last column nothing is known: its label may be a token of the next piece.
            scored = mask & F.pad(mask[:, 1:], (0, 1), value=True)
            shift_labels = shift_labels.masked_fill(~scored, IGNORED)
        if labels is not None:
            follows = mask & F.pad(mask[:, :-1], (1, 0))
            labels = labels.masked_fill(~follows, IGNORED)
    if cu_seqlens is not None and labels is not None:
        starts = cu_seqlens[:-1].long()
        starts = starts[starts < labels.numel()]
        labels = labels.reshape(-1).index_fill(0, starts, IGNORED).view(labels.shape)
    return labels, shift_labels


def _kept(features: Tensor, keep: int | Tensor) -> Tensor:
    if isinstance(keep, Tensor):
        return features[:, keep]
    return features[:, -keep:] if keep else features


AutoConfig.register("seqmix", SeqmixConfig)
AutoModelForCausalLM.register(SeqmixConfig, SeqmixForCausalLM)


def create(spec: ModelSpec | str, **fields: Any) -> SeqmixForCausalLM:
    """A new model of a specification or layout, e.g. `create("3x[mamba2], attention", width=64)`.

    `fields` are fields of `ModelSpec`, and ids such as `eos_token_id`. Weights follow torch's seed.
    """
    return SeqmixForCausalLM.create(spec, **fields)
