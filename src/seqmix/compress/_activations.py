"""What flows through a model on some text: between its blocks, and into the linear layers of a block.

Transforms that look at activations go through a model block by block, so that only one block's statistics are kept, and
every block is measured on what the changed blocks before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from seqmix.linears import Replacement
from seqmix.models.backbone import Block, LanguageModel
from seqmix.models.encoder import SeqmixForSequenceClassification, mean_of_tokens

TOKENS = 2048  # that go through a block at a time


@torch.no_grad()
def first_inputs(model: LanguageModel, ids: Tensor) -> Tensor:
    """What goes into the first block, [N, T, D], for windows of token ids [N, T]."""
    return model.backbone.enter(model.embedding(ids))[0]


@torch.no_grad()
def through(block: Block, x: Tensor) -> Tensor:
    """The outputs [N, T, D] of a block, some windows at a time."""
    rows = max(1, TOKENS // x.shape[1])
    return torch.cat([block(part)[0] for part in x.split(rows)])


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every dense linear layer with its place in `module`.

    What a replacement is made of is left out, and layers marked `only_read`: their weights are read elsewhere, so that
    nothing else can stand in their places.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            if not getattr(child, "only_read", False):
                yield name, child
        elif not isinstance(child, Replacement):
            yield from ((f"{name}.{inner}", layer) for inner, layer in linear_layers(child))


@contextmanager
def watched(
    layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """Inside the block, every call of a layer first gives its name and its input to `see`."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(name, inputs[0])

        return before

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def second_moments(block: Block, layers: Mapping[str, nn.Linear], x: Tensor) -> dict[str, Tensor]:
    """The mean of u u^T over the inputs u of each layer while x passes the block, [inputs, inputs] in float64.

    Layers that are not called, or whose weights are only read, are missing.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2).double()
        if len(rows):
            sums[name] = sums.get(name, 0.0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

    with watched(layers, see):
        through(block, x)
    return {name: total / counts[name] for name, total in sums.items()}


def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Logits from what the last block gives, x [N, T, D]: [N, T, vocabulary], or [N, classes] of a classifier."""
    inside = model.model
    assert isinstance(inside, LanguageModel)
    features = inside.backbone.leave(x)
    if isinstance(model, SeqmixForSequenceClassification):
        features = mean_of_tokens(features)
        return model.classifier(features).float()
    return inside.head(features).float()
