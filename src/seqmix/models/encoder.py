"""Encoders behind the interfaces of Hugging Face transformers: features, masked language models, classifiers.

Any mixer may stand in an encoder. One that reads both ways (`bidirectional_attention`) shows every token its whole
text; with causal mixers the same classes give a decoder's features or class. All of them, and `SeqmixForCausalLM`,
have the same weights below their heads, so `from_pretrained` reads what another kind has saved.

Axes: B rows, T time, D width, C classes.
"""

from __future__ import annotations

from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
)

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED, cu_seqlens_from_segments
from seqmix.models._hf_model import SeqmixConfig, SeqmixModel, new_columns, read

__all__ = [
    "SeqmixEncoder",
    "SeqmixForMaskedLM",
    "SeqmixForSequenceClassification",
    "mean_of_tokens",
]


class _Encoder(SeqmixModel):
    def features(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Features [B, T, D] of tokens [B, T].

        Args:
            input_ids: token ids [B, T]; or `inputs_embeds` [B, T, D].
            attention_mask: [B, T]; 0 marks pads, wherever they are. Their features are zero.
            token_type_ids: what BERT's tokenisers give; there is one type of token here, so all must be 0.
            segments: [B, T], a number per document; nothing passes from one document to another.

        Raises:
            ShapeError, ConfigError: for inputs that do not go together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("Give exactly one of input_ids and inputs_embeds.")
        if token_type_ids is not None and bool(token_type_ids.any()):
            raise ConfigError(
                "token_type_ids: this model has one type of token, numbered 0. Mark a second sentence by a "
                "token between the two."
            )
        x = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        mask = new_columns(attention_mask, x.shape[0], x.shape[1], 0)
        bounds = None
        if segments is not None:
            if mask is not None:
                raise ConfigError("segments go with no attention_mask.")
            bounds = cu_seqlens_from_segments(segments)
        return read(self.model.backbone, x, None, mask, bounds)[0]


class SeqmixEncoder(_Encoder):
    """The features of a model, without its head's output."""

    def __init__(self, config: SeqmixConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segments: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """`last_hidden_state` [B, T, D]; `features` describes the inputs."""
        if output_attentions or output_hidden_states:
            raise ConfigError(
                "output_attentions and output_hidden_states: seqmix models return neither."
            )
        output = BaseModelOutput(
            last_hidden_state=self.features(
                input_ids, attention_mask, token_type_ids, inputs_embeds, segments
            )
        )
        return output.to_tuple() if return_dict is False else output


class SeqmixForMaskedLM(_Encoder):
    """What stands at each place of a text: logits [B, T, vocabulary] from the features of that place."""

    def __init__(self, config: SeqmixConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        segments: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits [B, T, vocabulary]; with labels [B, T] also the mean cross-entropy, in nats.

        Position t is scored against label t; -100 is not scored. The loss is divided by `num_items_in_batch`
        (gradient accumulation) or by the number of scored labels. `features` describes the other inputs.
        """
        features = self.features(input_ids, attention_mask, token_type_ids, inputs_embeds, segments)
        logits = self.model.logits(features)
        loss = None
        if labels is not None:
            total = F.cross_entropy(
                logits.flatten(0, 1).float(),
                labels.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / count
        output = MaskedLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


class SeqmixForSequenceClassification(_Encoder):
    """The class of a text: a linear layer on the mean of its tokens' features."""

    def __init__(self, config: SeqmixConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        nn.init.normal_(self.classifier.weight, std=config.hidden_size**-0.5)
        nn.init.zeros_(self.classifier.bias)
        self.post_init()

    @classmethod
    def of(cls, model: SeqmixModel, *, num_labels: int) -> Self:
        """A classifier with a copy of the weights of `model`, of any kind, and a new linear layer."""
        config = SeqmixConfig.from_spec(model.config.to_spec(), num_labels=num_labels)
        made = cls(config).to(model.device, model.dtype)
        made.model.load_state_dict(model.model.state_dict())
        return made

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits [B, C]; with labels [B] also the mean cross-entropy. `features` describes the other inputs."""
        features = self.features(input_ids, attention_mask, token_type_ids, inputs_embeds)
        logits = self.classifier(mean_of_tokens(features, attention_mask))
        loss = None
        if labels is not None:
            total = F.cross_entropy(logits.float(), labels, reduction="sum")
            loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


def mean_of_tokens(features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """[B, D] from features [B, T, D]: the mean over the tokens that `attention_mask` [B, T] marks with 1."""
    if attention_mask is None:
        return features.mean(dim=1)
    weight = attention_mask.to(features.dtype).unsqueeze(-1)
    return (features * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)


AutoModel.register(SeqmixConfig, SeqmixEncoder)
AutoModelForMaskedLM.register(SeqmixConfig, SeqmixForMaskedLM)
AutoModelForSequenceClassification.register(SeqmixConfig, SeqmixForSequenceClassification)
