"""Encoder-decoders: one text is read in both directions, another is written while looking at it.

    m = encoder(source)          target_t ~ decoder(target_<t, m)

An encoder (`SeqmixEncoder`) and a language model (`SeqmixForCausalLM`) that share one embedding. After the token
mixer of every decoder block comes cross-attention to m, whose keys and values are part of the decoder's state: so
the encoder runs once for a source, and decoding goes on from a state as in any language model (Vaswani et al. 2017,
arXiv:1706.03762; with rotary positions and fewer decoder blocks, Elfeki et al. 2025, arXiv:2501.16273).

Axes: B rows, S tokens of the source, T of the target, D width.
"""

from __future__ import annotations

from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from seqmix.core.errors import ConfigError
from seqmix.core.state import State
from seqmix.data.packing import IGNORED
from seqmix.mixers._cross_attention import CrossAttention

# Modules, not names: importing transformers imports all kinds of models, whichever was first.
from seqmix.models import encoder, hf
from seqmix.models._hf_model import SavedModel, SeqmixConfig
from seqmix.models.backbone import ModelSpec
from seqmix.models.layout import Entry, Part, parse_part
from seqmix.models.state_cache import StateCache

__all__ = ["SeqmixForSeq2SeqLM", "SeqmixSeq2SeqConfig"]


class SeqmixSeq2SeqConfig(PreTrainedConfig):
    """The specifications of an encoder and a decoder, as dicts, and the ids of the special tokens."""

    model_type = "seqmix_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values", "encoder_last_hidden_state"]  # noqa: RUF012

    specs: dict[str, Any] | None = None  # `encoder` and `decoder`
    is_encoder_decoder: bool = True
    decoder_start_token_id: int = 0
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.specs or {}
        encoder, decoder = (
            ModelSpec.from_dict(given.get(name, {})) for name in ("encoder", "decoder")
        )
        if (encoder.width, encoder.vocabulary) != (decoder.width, decoder.vocabulary):
            raise ConfigError(
                f"encoder width={encoder.width}, vocabulary={encoder.vocabulary}; decoder width={decoder.width}, "
                f"vocabulary={decoder.vocabulary}: the two share an embedding, so both must be the same."
            )
        if not (encoder.tied and decoder.tied):
            raise ConfigError("tied=false: an encoder-decoder has one embedding. Leave it out.")
        self.specs = {"encoder": encoder.to_dict(), "decoder": decoder.to_dict()}
        super().__post_init__(**kwargs)

    def to_specs(self) -> tuple[ModelSpec, ModelSpec]:
        """The specifications of the encoder and of the decoder."""
        specs = self.specs or {}
        return ModelSpec.from_dict(specs["encoder"]), ModelSpec.from_dict(specs["decoder"])

    @property
    def vocab_size(self) -> int:
        return self.to_specs()[1].vocabulary

    @property
    def hidden_size(self) -> int:
        return self.to_specs()[1].width

    @property
    def tie_word_embeddings(self) -> bool:
        return True


class SeqmixForSeq2SeqLM(SavedModel, GenerationMixin):
    """Source tokens [B, S] and target tokens [B, T] to logits of the target; `generate` writes targets."""

    config_class = SeqmixSeq2SeqConfig
    _tied_weights_keys = {  # noqa: RUF012
        "encoder.model.embedding.weight": "decoder.model.embedding.weight",
        "encoder.model.head.weight": "decoder.model.embedding.weight",
        "decoder.model.head.weight": "decoder.model.embedding.weight",
    }

    def __init__(self, config: SeqmixSeq2SeqConfig) -> None:
        super().__init__(config)
        source, decoder = config.to_specs()
        self.encoder = encoder.SeqmixEncoder(SeqmixConfig.from_spec(source))
        self.decoder = hf.SeqmixForCausalLM(SeqmixConfig.from_spec(_with_places_to_read(decoder)))
        blocks = self.decoder.model.backbone.blocks
        for block in blocks[1::2]:
            block.mixer = CrossAttention(
                CrossAttention.Config(width=decoder.width, heads=decoder.heads)
            )
        self.decoder.model.backbone.initialise()
        self.post_init()

    @classmethod
    def create(cls, encoder_spec: ModelSpec, decoder_spec: ModelSpec, **tokens: int) -> Self:
        """A new model; `tokens` are ids such as `decoder_start_token_id`. Weights follow torch's seed."""
        specs = {"encoder": encoder_spec.to_dict(), "decoder": decoder_spec.to_dict()}
        return cls(SeqmixSeq2SeqConfig(specs=specs, **tokens))

    def get_encoder(self, modality: str | None = None) -> encoder.SeqmixEncoder:
        return self.encoder

    def get_decoder(self) -> hf.SeqmixForCausalLM:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Logits [B, T, vocabulary] of the target; with labels also the mean cross-entropy, in nats.

        Args:
            input_ids: the source [B, S], pads marked with 0 in `attention_mask` [B, S].
            decoder_input_ids: the target as far as it is known [B, T], from the start token on, pads marked with
                0 in `decoder_attention_mask`; by default the labels, one place to the right.
            encoder_outputs: what the encoder gave for this source, instead of `input_ids`.
            past_key_values: the cache of an earlier call for this source; `decoder_input_ids` go on from it.
            labels: the target [B, T]; position t is scored against label t, and -100 is not scored.
            use_cache: whether to return a cache; by default outside training.
            num_items_in_batch: what the summed loss is divided by, instead of the number of scored labels.

        Raises:
            ShapeError, ConfigError: for inputs that do not go together.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ConfigError("Give decoder_input_ids, or labels, from which they follow.")
            start = self.config.decoder_start_token_id
            decoder_input_ids = F.pad(
                labels.masked_fill(labels == IGNORED, start)[:, :-1], (1, 0), value=start
            )
        cache = StateCache() if past_key_values is None else past_key_values
        if cache.state is None:
            if encoder_outputs is None:
                encoder_outputs = self.encoder(input_ids, attention_mask)
            cache.state = self.start(encoder_outputs[0], attention_mask)
        output = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            past_key_values=cache,
            use_cache=use_cache,
            num_items_in_batch=num_items_in_batch,
            shift_labels=labels,
        )
        result = Seq2SeqLMOutput(
            loss=output.loss,
            logits=output.logits,
            past_key_values=output.past_key_values,
            encoder_last_hidden_state=None if encoder_outputs is None else encoder_outputs[0],
        )
        return result.to_tuple() if return_dict is False else result

    def start(self, memory: Tensor, mask: Tensor | None = None) -> State:
        """The decoder's state before the first token, from the encoder's features [B, S, D] of the source."""
        backbone = self.decoder.model.backbone
        state = backbone.initial_state(len(memory), memory)
        first = len(state) - len(
            backbone.blocks
        )  # before the blocks' states there may be one of positions
        for place, block in enumerate(backbone.blocks, start=first):
            if isinstance(block.mixer, CrossAttention):
                state[place] = block.mixer.remember(memory, mask)
        return state

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: StateCache | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` gets at one step of `generate`: the tokens that the cache has not read yet."""
        new = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
        return {
            "decoder_input_ids": new,
            "attention_mask": attention_mask,
            "encoder_outputs": encoder_outputs,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = StateCache()


def _with_places_to_read(spec: ModelSpec) -> ModelSpec:
    """Two blocks for each: the token mixer, then what becomes cross-attention, with the channel mixer."""
    blocks = []
    for entry in spec.entries():
        channel = entry.channel or parse_part(spec.channel)
        blocks += [Entry(entry.mixer, Part("none")), Entry(Part("attention"), channel)]
    return spec.with_entries(blocks)


AutoConfig.register("seqmix_seq2seq", SeqmixSeq2SeqConfig)
AutoModelForSeq2SeqLM.register(SeqmixSeq2SeqConfig, SeqmixForSeq2SeqLM)
