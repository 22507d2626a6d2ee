"""Greedy removal of sublayers: at every step the candidate goes whose removal costs the output distribution least.

    change = mean over tokens of KL(p || q) = sum p (log p - log q)
    price = (change with the candidate gone as well - change so far) / (numbers stored with the candidate)^power

between the next-token distributions p of the whole model and q of the pruned one: what its loss would rise by on text
that the whole model writes. What goes into every block is kept, so that a candidate costs only the blocks from its own
on. All candidates are measured once on a quarter of the text. Every step then measures on all of it the candidates in
blocks beside those that went last, whose prices change most, and of the others those that looked cheapest when last
measured, until the cheapest of all is one measured in this step (the accelerated greedy of Minoux 1978).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from seqmix.compress._activations import first_inputs
from seqmix.compress._structure import Place, language_model, sublayer, without
from seqmix.compress._transform import Work
from seqmix.models.backbone import LanguageModel
from seqmix.models.hf import SeqmixForCausalLM

LOOK = 4  # of so many windows, one is for the first look at all candidates


@torch.no_grad()
def remove_greedily(
    model: SeqmixForCausalLM,
    candidates: Sequence[Sequence[Place]],
    counts: Sequence[int],
    number: int,
    ids: Tensor,
    work: Work,
    *,
    power: float,
) -> list[tuple[Sequence[Place], float]]:
    """Candidates in the order in which they went, each with the change of the output after it.

    A candidate is the sublayers that go together, and several may share some. Each has its count, and those that went
    count `number` in all. What `work` remembers holds for every `number`.
    """
    inside = language_model(model)
    was_training = model.training
    model.eval()
    try:
        target = _distribution(inside, first_inputs(inside, ids), 0)
        sizes = [sum(_numbers(sublayer(model, place)) for place in places) for places in candidates]
        gone: list[tuple[Sequence[Place], float]] = []
        unknown = dict.fromkeys(range(len(candidates)), -math.inf)
        look = partial(
            _cheapest, model, candidates, sizes, unknown, gone, ids[::LOOK], target[::LOOK], power
        )
        found = work.remember("first look", look) if number else []
        prices = {int(i): change / sizes[int(i)] ** power for i, change in found}
        left = number
        bar = iter(work.track(range(number), "pruning"))
        while prices := {i: price for i, price in prices.items() if counts[i] <= left}:
            so_far = gone[-1][1] if gone else 0.0
            search = partial(_cheapest, model, candidates, sizes, prices, gone, ids, target, power)
            name = f"step {len(gone)}, {min(left, max(counts))} left"
            measured = {int(i): change for i, change in work.remember(name, search)}
            for i, change in measured.items():
                prices[i] = (change - so_far) / sizes[i] ** power
            best = min(measured, key=prices.__getitem__)
            gone.append((candidates[best], measured[best]))
            left -= counts[best]
            prices = _after(prices, candidates, candidates[best])
            for _ in range(counts[best]):
                next(bar)
        return gone
    finally:
        model.train(was_training)


def _numbers(module: nn.Module) -> int:
    """How many numbers are stored with a sublayer: parameters, or the buffers of layers kept in another way."""
    return max(1, sum(tensor.numel() for tensor in module.state_dict().values()))


def _after(
    prices: dict[int, float], candidates: Sequence[Sequence[Place]], gone: Sequence[Place]
) -> dict[int, float]:
    """The prices of what can still go; unknown for what stands in a block of those gone, or in the next to it."""
    near = {block + step for block, _ in gone for step in (-1, 0, 1)}
    return {
        i: -math.inf if near & {block for block, _ in candidates[i]} else price
        for i, price in prices.items()
        if not set(gone) & set(candidates[i])
    }


def _cheapest(
    model: SeqmixForCausalLM,
    candidates: Sequence[Sequence[Place]],
    sizes: Sequence[int],
    prices: dict[int, float],
    gone: Sequence[tuple[Sequence[Place], float]],
    ids: Tensor,
    target: Tensor,
    power: float,
) -> list[list[float]]:
    """Candidates with the changes that they would make, the cheapest among them."""
    inside = language_model(model)
    so_far = gone[-1][1] if gone else 0.0
    prices, found = dict(prices), []
    with without(model, [place for places, _ in gone for place in places]):
        inputs = [first_inputs(inside, ids)]
        for block in inside.backbone.blocks:
            inputs.append(block(inputs[-1])[0])
        measured: set[int] = set()
        while (best := min(prices, key=prices.__getitem__)) not in measured:
            start = min(number for number, _ in candidates[best])
            with without(model, candidates[best]):
                change = divergence(target, _distribution(inside, inputs[start], start))
            prices[best] = (change - so_far) / sizes[best] ** power
            measured.add(best)
            found.append([best, change])
    return found


def _distribution(inside: LanguageModel, x: Tensor, start: int) -> Tensor:
    """Log-probabilities [N, T, vocabulary] from what goes into block `start`."""
    for block in inside.backbone.blocks[start:]:
        x, _ = block(x)
    return inside.logits(inside.backbone.leave(x)).float().log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> float:
    """The mean of KL(p || q) in nats of log-probabilities [..., vocabulary]."""
    return float(torch.linalg.vecdot(p.exp(), p - q).mean().clamp_min(0))
