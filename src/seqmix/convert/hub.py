"""Models of transformers as models of this package, and back, with equal logits.

    model = to_seqmix("smollm2-135m")          every method of the package works on it
    to_transformers(model).save_pretrained(folder)

The families are the files of `seqmix.convert.families`. A language model becomes a `SeqmixForCausalLM`; BERT becomes a
`SeqmixEncoder` or a `SeqmixForMaskedLM`. A converted model keeps the configuration that it came with
(`config.source`), the ids of its special tokens and its generation settings. Dropout is not taken along.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from seqmix.convert.families import FAMILIES, Family
from seqmix.core.errors import CheckpointError, ConfigError
from seqmix.models.backbone import ModelSpec
from seqmix.models.hf import SeqmixConfig, SeqmixForCausalLM, SeqmixModel
from seqmix.models.pretrained import load

Pair = tuple[tuple[str, ...], tuple[str, ...], Callable[..., tuple[Tensor, ...]]]
M = TypeVar("M", bound=PreTrainedModel)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_seqmix(model: PreTrainedModel | str | Path) -> Any:
    """The same model of this package's blocks, in evaluation mode; what is one already is returned as it is.

    `model` is a language model or an encoder of transformers, or whatever `seqmix.load` takes. Logits, or an
    encoder's features, are equal up to rounding. The given model stays as it was and shares no memory with the new
    one.
    Raises `ConfigError` for a family, or a field of its configuration, that the blocks of this package do not compute.
    """
    if isinstance(model, str | Path):
        model, _ = load(model)
    if isinstance(model, SeqmixModel):
        return model
    source = _described(model)
    family = family_of(source)
    config = SeqmixConfig.from_spec(
        family.spec(source),
        source=source.to_dict(),
        **{name: getattr(source, name, None) for name in TOKENS},
    )
    with torch.device("meta"):  # the weights come from elsewhere
        made = kind_of(source)(config)
    pairs = ((w.theirs, w.ours, w.load) for w in family.weights(source))
    return _filled(made, model, family.tensors(model), pairs).eval()


def to_transformers(model: SeqmixModel) -> PreTrainedModel:
    """The model of transformers that `model` came from, with the weights that it has now.

    Raises `ConfigError` for a model that did not come from there, or whose blocks are no longer those of its family
    (pruned or replaced layers, other mixers): it stays a model of this package, which transformers loads as well.
    """
    if not isinstance(model, SeqmixModel):
        raise ConfigError(f"model is a {type(model).__name__}, wanted a model of seqmix.")
    if model.config.source is None:
        raise ConfigError(
            "model did not come from transformers (its config has no source), so there is no family that it could go "
            "back to. save_pretrained writes a folder that transformers loads with seqmix installed."
        )
    config = source_config(model.config)
    family = family_of(config)
    spec = model.config.to_spec()
    config.vocab_size = spec.vocabulary
    if reason := difference(spec, family.spec(config)):
        raise ConfigError(
            f"model is no longer a {config.model_type}: {reason}. save_pretrained writes a folder that transformers "
            "loads with seqmix installed."
        )
    with no_init_weights():  # not on `meta`: some buffers are computed here and stored nowhere
        made = family.build(config)
    pairs = ((w.ours, w.theirs, w.save) for w in family.weights(config))
    return _filled(made, model, model.state_dict(), pairs).train(model.training)


def specification(model: PreTrainedModel) -> ModelSpec:
    """What `to_seqmix` makes of a model, which may be without weights; raises `ConfigError` where it would."""
    if isinstance(model, SeqmixModel):
        return model.config.to_spec()
    source = _described(model)
    kind_of(source)
    return family_of(source).spec(source)


def _described(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of a model, with its class as the only architecture."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config


def family_of(config: PreTrainedConfig) -> Family:
    """The family that this configuration is of; raises `ConfigError` for one that this package has not."""
    families = [FAMILIES.get(name) for name in FAMILIES]
    for family in families:
        if config.model_type in family.model_types:
            return family
    known = sorted(itertools.chain.from_iterable(family.model_types for family in families))
    raise ConfigError(
        f"model_type={config.model_type!r} has no family here, wanted one of {', '.join(known)}. Keep this model in "
        "transformers (seqmix.accelerate may make it faster)."
    )


def kind_of(config: PreTrainedConfig) -> type[SeqmixModel]:
    """What a model becomes whose class is the first of `config.architectures`; `ConfigError` if nothing."""
    kinds = family_of(config).kinds
    (name,) = config.architectures
    if not kinds:
        return SeqmixForCausalLM
    if name not in kinds:
        raise ConfigError(f"A {name} has no counterpart here, wanted one of {', '.join(kinds)}.")
    return kinds[name]


def source_config(config: SeqmixConfig) -> PreTrainedConfig:
    """The configuration of transformers that a converted model came with."""
    fields = dict(config.source or {})
    return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)


def difference(found: ModelSpec, wanted: ModelSpec) -> str | None:
    """What keeps a model of the first specification from being one of the second, or None."""
    if found.replaced:
        places = list(found.replaced)
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        return f"{places[0]}{more} is kept as {found.replaced[places[0]]['kind']}"
    ours, theirs = found.entries(), wanted.entries()
    if len(ours) != len(theirs):
        return f"it has {len(ours)} blocks, its source {len(theirs)}"
    for index, (have, want) in enumerate(zip(ours, theirs, strict=True)):
        if have != want:
            return f"block {index} is {have}, that of its source {want}"
    for field, want in wanted.to_dict().items():
        have = getattr(found, field)
        if field not in ("layout", "depth") and have != want:
            return f"{field} is {have!r}, that of its source {want!r}"
    return None


def _filled(
    made: M, model: PreTrainedModel, tensors: Mapping[str, Tensor], pairs: Iterable[Pair]
) -> M:
    """`made` with copies of the tensors of `model`, each under the name and in the form that `pairs` say."""
    given = dict(tensors)
    for tied in model.all_tied_weights_keys:
        given.pop(tied)
    found: dict[str, Tensor] = {}
    for before, after, convert in pairs:
        try:
            new = convert(*(given.pop(name) for name in before))
        except KeyError as error:
            raise CheckpointError(f"The model has no weight {error}. Load it again.") from None
        found |= {name: x.clone() for name, x in zip(after, new, strict=True)}
    if given:
        raise CheckpointError(
            f"The model has weights that its family does not: {', '.join(list(given)[:3])}. Load it again without "
            "adapters or further heads."
        )
    tied = made.all_tied_weights_keys
    found |= {name: found[source] for name, source in tied.items()}
    made.load_state_dict(found, assign=True)
    made.tie_weights()
    if (settings := getattr(model, "generation_config", None)) is not None:
        made.generation_config = copy.deepcopy(settings)
    return made
