"""Which parameters of a pretrained model are trained, and what training them costs.

    all     every parameter
    head    the token embeddings and the output layer
    last    the last block
    lora    a product of two matrices of rank 8 beside every linear layer of the blocks (Hu et al. 2021), by PEFT
    prefix  16 keys and values per layer before every text (Li & Liang 2021), by PEFT; at first those of 16 ends of text

The first three change weights of the model itself. Adapters are further parameters beside it: `merged` adds a low
rank to the weights that it stands beside; a prefix belongs to no weight and stays an adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seqmix.core import extras
from seqmix.core.errors import ConfigError
from seqmix.train.evaluation import takes_segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK = 8
PREFIX = 16


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, nothing of `module` is trained; afterwards what was trainable is again."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def select_parameters(model: PreTrainedModel, parameters: str, *, seed: int = 0) -> PreTrainedModel:
    """The model with the parameters of that name as the only ones that are trained.

    It is the same object for `all`, `head` and `last`; `lora` and `prefix` put it into a `PeftModel`, whose new
    parameters depend on `seed` alone.
    Raises `ConfigError` for another name, for `prefix` on a model whose state is not a cache of keys and values,
    and where the blocks are not to be found; `MissingExtra` where PEFT is absent.
    """
    if parameters not in SELECTIONS:
        raise ConfigError(f"parameters={parameters!r}, wanted one of {', '.join(SELECTIONS)}.")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft asks transformers by a name that it is about to drop
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return SELECTIONS[parameters](model)


def _all(model: PreTrainedModel) -> PreTrainedModel:
    return model.requires_grad_(True)


def _head(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.requires_grad_(True)
    return model


def _last(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    blocks_of(model)[-1].requires_grad_(True)
    return model


def _lora(model: PreTrainedModel) -> PreTrainedModel:
    peft = extras.require("peft", extra="train")
    inside = dict(blocks_of(model).named_modules())
    names = sorted({name for name, module in inside.items() if isinstance(module, nn.Linear)})
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=names
    )
    return peft.get_peft_model(model, config)


def _prefix(model: PreTrainedModel) -> PreTrainedModel:
    if takes_segments(model):
        raise ConfigError(
            "parameters='prefix' needs a cache of keys and values, and a seqmix model keeps its state in another "
            "form. Choose one of all, head, last, lora."
        )
    peft = extras.require("peft", extra="train")
    end = model.config.eos_token_id or 0
    with (
        torch.no_grad()
    ):  # a prefix of known tokens disturbs less than a random one, before it has learnt anything
        ends = torch.full((1, PREFIX), end if isinstance(end, int) else end[0], device=model.device)
        cache = model(input_ids=ends, use_cache=True).past_key_values
    keys_and_values = [(layer.keys, layer.values) for layer in cache.layers]
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
    adapted = peft.get_peft_model(model, config)
    peft.initialize_kv_prefix_from_past_key_values(adapted, past_key_values=keys_and_values)
    return adapted


SELECTIONS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "all": _all,
    "head": _head,
    "last": _last,
    "lora": _lora,
    "prefix": _prefix,
}


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own class again, the low rank added to its weights; one without adapters as it is.

    Raises `ConfigError` for a prefix, which no weight can hold.
    """
    if not hasattr(model, "peft_config"):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ConfigError(
            "merged: a prefix is no part of the weights. Keep the adapter, and save it by its save_pretrained."
        )
    return model.merge_and_unload()


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a decoder: the list of modules that has as many as the model has layers."""
    layers = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise ConfigError(
        f"{type(model).__name__} has no list of its {layers} blocks. Choose parameters='all' or 'head'."
    )


@dataclass(frozen=True)
class TrainingCost:
    """Trained parameters, the bytes that AdamW keeps for them, and FLOPs per token, forward and backward."""

    parameters: int
    optimizer_bytes: int
    flops_per_token: float


def training_cost(model: PreTrainedModel, input_ids: Tensor) -> TrainingCost:
    """What a training step on `input_ids` [B, T] costs.

    The matrix products that run are counted. What happens inside a fused attention is not: 4 T width more per
    token and block, forward.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.train()
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    model.train(training)
    model.zero_grad(set_to_none=True)
    return TrainingCost(
        parameters=sum(parameter.numel() for parameter in trained),
        optimizer_bytes=sum(
            2 * parameter.numel() * parameter.element_size() for parameter in trained
        ),
        flops_per_token=counter.get_total_flops() / input_ids.numel(),
    )
