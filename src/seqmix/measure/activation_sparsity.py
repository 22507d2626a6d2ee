"""Activation sparsity: how many hidden neurons of the channel mixers a language model does without.

A channel mixer ends in y = sum_j x_j w_j, x_j the activation of neuron j and w_j its column of the last matrix.
A threshold t drops the neurons whose contribution is small, |x_j| |w_j| <= t. The error it makes on a token,

    |sum of the dropped x_j w_j| / |y|,

averaged over the tokens, is the layer's cumulative error of tail truncation (CETT). Every layer gets the
threshold of the same CETT, and the PPL-p% sparsity is that of the largest CETT at which the perplexity is at
most 1 + p% of the whole model's. Luo et al. 2024 (arXiv:2411.02335), section 3 and algorithm 1; nothing in it
depends on the activation function. The laws of the same paper are in `seqmix.measure.sparsity_laws`.

Axes: N tokens, F hidden neurons, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.core.errors import RangeError
from seqmix.models.channel_mixers import channel_outputs

POINTS = 33  # thresholds per layer between which the error of truncation is interpolated
STEPS = 10  # of the bisection for the largest error of truncation

# Which activations [N, F] of a layer stay: called with the layer's number and the activations.
Mask = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Sparsity:
    """`ratio` is the share of neurons that stay, over all tokens and layers; 1 - ratio is the sparsity."""

    ratio: float
    by_layer: list[float]
    loss: float  # nats per token, with the neurons dropped
    dense_loss: float
    setting: float  # the error of truncation, or whatever else the search was over


def contributions(x: Tensor, weight: Tensor) -> Tensor:
    """|x_j| |w_j| for x [N, F] and weight [D, F]: the size of what each neuron adds to the output."""
    return x.abs() * weight.norm(dim=0)


def truncation_error(x: Tensor, weight: Tensor, threshold: float | Tensor) -> Tensor:
    """CETT of x [N, F] at `threshold`, a scalar: the mean over the tokens whose output is not zero."""
    dropped = x.masked_fill(contributions(x, weight) > threshold, 0.0)
    whole = (x @ weight.T).norm(dim=-1)
    error = (dropped @ weight.T).norm(dim=-1)
    scored = whole > 0
    return (error[scored] / whole[scored]).mean() if scored.any() else error.sum()


def activation_sparsity(model: nn.Module, input_ids: Tensor, *, increase: float = 0.01) -> Sparsity:
    """PPL-p% sparsity of `model` on the texts `input_ids [B, T]`, with p% = `increase`.

    Raises `RangeError` for an increase that is not positive, `ConfigError` for a model without channel mixers.
    """
    layers = channel_outputs(model)
    with recorded(layers) as seen, torch.no_grad():
        dense = _loss(model, input_ids)
    curves = [_Curve(torch.cat(x), layer.weight) for x, layer in zip(seen, layers, strict=True)]

    def keep(error: float) -> Mask:
        thresholds = [curve.threshold(error) for curve in curves]
        norms = [layer.weight.norm(dim=0) for layer in layers]
        return lambda index, x: x.abs() * norms[index] > thresholds[index]

    return sparsest(model, input_ids, keep, increase=increase, dense_loss=dense)


def sparsest(
    model: nn.Module,
    input_ids: Tensor,
    keep: Callable[[float], Mask],
    *,
    increase: float,
    dense_loss: float | None = None,
) -> Sparsity:
    """The sparsity of the largest setting in [0, 1] at which perplexity grows by at most a share `increase`.

    `keep(setting)` says which activations stay; more must fall as the setting grows. It is found by bisection.
    """
    if not increase > 0:
        raise RangeError(f"increase={increase}, wanted more than 0: 0.01 for PPL-1% sparsity.")
    if dense_loss is None:
        with torch.no_grad():
            dense_loss = _loss(model, input_ids)
    allowed = dense_loss + torch.tensor(1 + increase).log().item()
    low, high = 0.0, 1.0
    best = _measure(model, input_ids, keep(0.0), dense_loss, 0.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = _measure(model, input_ids, keep(middle), dense_loss, middle)
        if found.loss <= allowed:
            low, best = middle, found
        else:
            high = middle
    return best


@contextmanager
def recorded(layers: Sequence[nn.Linear]) -> Iterator[list[list[Tensor]]]:
    """Inside the block, what each of `layers` reads is kept: a list of [N, F] per layer."""
    seen: list[list[Tensor]] = [[] for _ in layers]

    def keep(index: int) -> Callable[..., None]:
        return lambda module, inputs: seen[index].append(inputs[0].detach().flatten(0, -2))

    hooks = [layer.register_forward_pre_hook(keep(i)) for i, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _measure(
    model: nn.Module, input_ids: Tensor, keep: Mask, dense_loss: float, setting: float
) -> Sparsity:
    layers = channel_outputs(model)
    kept = [0.0] * len(layers)
    total = [0] * len(layers)

    def truncate(index: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            x = inputs[0]
            mask = keep(index, x)
            kept[index] += float(mask.sum())
            total[index] += mask.numel()
            return x.masked_fill(~mask, 0.0)

        return hook

    hooks = [layer.register_forward_pre_hook(truncate(i)) for i, layer in enumerate(layers)]
    try:
        loss = _loss(model, input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    by_layer = [k / n for k, n in zip(kept, total, strict=True)]
    return Sparsity(sum(by_layer) / len(by_layer), by_layer, loss, dense_loss, setting)


def _loss(model: nn.Module, input_ids: Tensor) -> float:
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten()).item()


class _Curve:
    """The threshold of one layer as a function of the error of truncation, piecewise linear."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        x, weight = x.float(), weight.detach().float()
        sizes = contributions(x, weight).flatten()
        # Sorting all would take longer than the matrix products; 2^16 of them place the quantiles.
        sample = sizes[:: max(1, sizes.numel() // 2**16)].sort().values
        places = torch.linspace(0, 1, POINTS) * (len(sample) - 1)
        thresholds = sample[places.round().long()]
        thresholds[-1] = sizes.max()
        errors = torch.stack([truncation_error(x, weight, t) for t in thresholds])
        self.thresholds = thresholds
        self.errors = errors.cummax(0).values

    def threshold(self, error: float) -> Tensor:
        """The largest threshold whose error is at most `error`."""
        above = int((self.errors <= error).sum())
        if above == 0:
            return self.thresholds.new_tensor(-1.0)  # nothing falls, neurons at zero included
        if above == POINTS:
            return self.thresholds[-1]
        low, high = self.errors[above - 1], self.errors[above]
        share = (error - low) / (high - low)
        return torch.lerp(self.thresholds[above - 1], self.thresholds[above], share)
