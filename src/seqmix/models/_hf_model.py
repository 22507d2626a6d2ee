"""What every seqmix model behind the interfaces of transformers shares: configuration, saving, and pads.

Pads never reach a mixer: a padded batch is packed, so a text gives the same whether it is padded or not,
and states have one row per text.

Imported through `seqmix.models.hf`, `encoder` and `seq2seq`.
Axes: B rows, T time, D width, N texts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from seqmix.core.errors import CheckpointError, ShapeError
from seqmix.core.state import State
from seqmix.mixers._mixer import undecayed
from seqmix.models.backbone import Backbone, LanguageModel, ModelSpec


class SeqmixConfig(PreTrainedConfig):
    """A `ModelSpec`, as a dict under `spec`, and the ids of the special tokens."""

    model_type = "seqmix"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads a list)

    spec: dict[str, Any] | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    mask_token_id: int | None = None

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


class SavedModel(PreTrainedModel):
    """A model whose constructor sets every weight, and which is loaded whole or not at all."""

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def post_init(self) -> None:
        """For the end of a constructor: all modules are there."""
        self._keep_in_fp32_modules_strict = [f"{name}$" for name in sorted(undecayed(self))]
        super().post_init()

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


class SeqmixModel(SavedModel):
    """A `LanguageModel` under `model`, whatever its head is used for: all kinds have the same weights."""

    config_class = SeqmixConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: SeqmixConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.to_spec())

    @classmethod
    def create(cls, spec: ModelSpec | str, **fields: Any) -> Self:
        """A new model of a specification or layout; weights follow torch's seed.

        `fields` are fields of `ModelSpec` and ids of special tokens such as `eos_token_id`.
        """
        tokens = {name: fields.pop(name) for name in list(fields) if name.endswith("_token_id")}
        values = (spec.to_dict() if isinstance(spec, ModelSpec) else {"layout": spec}) | fields
        return cls(SeqmixConfig.from_spec(ModelSpec.from_dict(values), **tokens))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value
        self.model.spec = dataclasses.replace(self.model.spec, vocabulary=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.head = value


def new_columns(mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
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


def read(
    backbone: Backbone, x: Tensor, state: State, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, State]:
    """Features [B, T, D] of x [B, T, D] and the state after it.

    The tokens that `mask` leaves are packed, and zeros stand for the others. With `cu_seqlens`, the rows are N
    texts end to end.
    """
    shape = x.shape
    if mask is not None:
        cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        tokens = mask.flatten().nonzero().flatten()
        packed = x.flatten(0, 1)[tokens].unsqueeze(0)
        features, state = backbone(packed, state, cu_seqlens=cu_seqlens)
        spread = features.new_zeros(shape[0] * shape[1], features.shape[-1])
        return spread.index_copy(0, tokens, features[0]).view(shape), state
    if cu_seqlens is not None:
        x = x.reshape(1, -1, shape[-1])
    features, state = backbone(x, state, cu_seqlens=cu_seqlens)
    return features.view(shape), state
