"""Models with other parts: a new specification with tensors for it, or single layers replaced."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from seqmix.linears import Replacement, replace_layer
from seqmix.models.backbone import ModelSpec

M = TypeVar("M", bound=PreTrainedModel)


def rebuild(model: M, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> M:
    """A model of the class of `model` and of `spec`, with these tensors, named as in `state_dict`.

    All else (ids of special tokens, generation settings) is that of `model`, which stays as it was. Tied weights are
    given once or twice. Raises `RuntimeError` for tensors that do not fit: a mistake of the caller.
    """
    config = copy.deepcopy(model.config)
    config.spec = spec.to_dict()
    made = type(model)(config).to(model.dtype)  # before loading, which would round to float32
    wanted = made.state_dict()
    tied = set(getattr(made, "all_tied_weights_keys", None) or {})
    given = {name: tensor.detach() for name, tensor in tensors.items()}
    for name in tied & (wanted.keys() - given.keys()):
        given[name] = given[made.all_tied_weights_keys[name]]
    made.load_state_dict(given)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.dtype).train(model.training)


def replaced(model: M, layers: Mapping[str, Replacement]) -> M:
    """A copy of `model` in which `layers` stand in the places that they are named after.

    Places are those in the language model inside, such as `backbone.blocks.0.mixer.query`, `head` or `embedding`. What
    replaces a tied weight unties it.
    """
    made = copy.deepcopy(model)
    spec = made.config.to_spec()
    tied = spec.tied and not {"head", "embedding"} & layers.keys()
    for place, layer in layers.items():
        replace_layer(made.model, place, layer)
    described = {place: layer.describe() for place, layer in layers.items()}
    spec = dataclasses.replace(spec, replaced={**spec.replaced, **described}, tied=tied)
    made.config.spec = spec.to_dict()
    made.model.spec = spec
    return made
