"""Language models behind the interfaces of Hugging Face transformers.

`save_pretrained`, `from_pretrained`, the Auto classes, `generate`, `Trainer` and PEFT work on every layout.
Pads never reach a mixer: a padded batch is packed, so a text gives the same whether it is padded or not,
and states have one row per text. Importing this module registers the classes with `AutoConfig` and
`AutoModelForCausalLM`; `import seqmix` arranges that it is imported with transformers.

Axes: B rows, T time, D width, N texts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from seqmix.core.errors import CheckpointError, ConfigError, DataError, ShapeError
from seqmix.core.state import State, num_rows
from seqmix.data.packing import IGNORED, cu_seqlens_from_segments
from seqmix.mixers._mixer import undecayed
from seqmix.models.backbone import LanguageModel, ModelSpec
from seqmix.models.pretrained import load
from seqmix.models.state_cache import StateCache

__all__ = ["SeqmixConfig", "SeqmixForCausalLM", "StateCache", "create", "load"]


class SeqmixConfig(PreTrainedConfig):
    """A `ModelSpec`, as a dict under `spec`, and the ids of the special tokens.

    `source` is the configuration of the model of transformers that this one was made from (`convert.hub`).
    """

    model_type = "seqmix"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads a list)

    spec: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.spec = ModelSpec.from_dict(self.spec or {}).to_dict()
        super().__post_init__(**kwargs)

    @classmethod
    def from_spec(cls, spec: ModelSpec, **fields: Any) -> Self:
        """The configuration of a model of this specification."""
        return cls(spec=spec.to_dict(), **fields)

    def to_spec(self) -> ModelSpec:
        """The specification that is stored here."""
        return ModelSpec.from_dict(self.spec or {})

    # Names by which transformers and PEFT ask; the specification is the one place where they are kept.
    @property
    def vocab_size(self) -> int:
        return self.to_spec().vocabulary

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.spec = dataclasses.replace(self.to_spec(), vocabulary=value).to_dict()

    @property
    def hidden_size(self) -> int:
        return self.to_spec().width

    @property
    def num_hidden_layers(self) -> int:
        return len(self.to_spec().entries())

    @property
    def num_attention_heads(self) -> int:
        return self.to_spec().heads

    @property
    def tie_word_embeddings(self) -> bool:
        return self.to_spec().tied


class SeqmixForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel` with the interfaces of transformers; `forward` describes the inputs."""

    config_class = SeqmixConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: SeqmixConfig) -> None:
        super().__init__(config)
        spec = config.to_spec()
        self.model = LanguageModel(spec)
        for block, entry in zip(self.model.backbone.blocks, spec.entries(), strict=True):
            if block.mixer is not None and not block.mixer.causal:
                raise ConfigError(
                    f"{entry.mixer.name} reads the future, so it cannot predict the next token. "
                    "Use a causal mixer in a language model."
                )
        self._keep_in_fp32_modules_strict = [f"{name}$" for name in sorted(undecayed(self))]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: constructors have initialised, and a checkpoint with missing weights is refused."""

    def _initialize_missing_keys(self, is_quantized: bool) -> None:
        """Restores buffers that checkpoints leave out."""
        left_out = [name for name, _ in self.named_non_persistent_buffers()]
        if left_out:
            with torch.device("cpu"):
                fresh = type(self)(self.config)
            for name in left_out:
                owner, _, leaf = name.rpartition(".")
                device = self.get_buffer(name).device
                value = fresh.get_buffer(name).to(device)
                self.get_submodule(owner).register_buffer(leaf, value, persistent=False)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but raises `CheckpointError` unless every weight is there and fits."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, info[kind])):
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise CheckpointError(
                    f"The weights in {folder} do not fit its config.json: {kind.replace('_', ' ')} "
                    f"{shown}. Copy or download the folder again, or save the model again."
                )
        return (model, info) if wants_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value
        self.model.spec = dataclasses.replace(self.model.spec, vocabulary=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.head = value

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
        mask = _new_columns(attention_mask, batch, length, cache.length)
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
        features, state = self._features(x, before, mask, cu_seqlens)
        if use_cache or (use_cache is None and not self.training):
            cache.advance(state, length, lambda n: self._replay(x, before, mask, n))
        else:
            cache = None
        scored = labels is not None or shift_labels is not None
        if not scored:
            features = _kept(features, logits_to_keep)
        logits = self.model.head(features)
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

    def _features(
        self, x: Tensor, state: State, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, State]:
        """Features [B, T, D]; the tokens that `mask` leaves are packed, and zeros stand for the others."""
        shape = x.shape
        if mask is not None:
            cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
            tokens = mask.flatten().nonzero().flatten()
            packed = x.flatten(0, 1)[tokens].unsqueeze(0)
            features, state = self.model.backbone(packed, state, cu_seqlens=cu_seqlens)
            spread = features.new_zeros(shape[0] * shape[1], features.shape[-1])
            return spread.index_copy(0, tokens, features[0]).view(shape), state
        if cu_seqlens is not None:
            x = x.reshape(1, -1, shape[-1])
        features, state = self.model.backbone(x, state, cu_seqlens=cu_seqlens)
        return features.view(shape), state

    @torch.no_grad()
    def _replay(self, x: Tensor, before: State, mask: Tensor | None, columns: int) -> State:
        mask = None if mask is None else mask[:, :columns]
        return self._features(x[:, :columns], before, mask, None)[1]

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


def _new_columns(mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    """The new tokens' part [B, T] of an attention mask, as bool; None where nothing is padded."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
        raise ShapeError(
            f"attention_mask has shape {list(mask.shape)}, wanted [{batch}, {length}]"
            + (f" or [{batch}, {past + length}]." if past else ".")
        )
    mask = mask[:, -length:] != 0
    if bool(mask.all()):
        return None
    if not bool(mask.any()):
        raise ShapeError(
            "attention_mask marks every token as padding. Give at least one real token."
        )
    return mask


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

    `fields` are fields of `ModelSpec`, and `eos_token_id`, `pad_token_id`. Weights follow torch's seed.
    """
    tokens = {name: fields.pop(name) for name in ("eos_token_id", "pad_token_id") if name in fields}
    values = (spec.to_dict() if isinstance(spec, ModelSpec) else {"layout": spec}) | fields
    return SeqmixForCausalLM(SeqmixConfig.from_spec(ModelSpec.from_dict(values), **tokens))
