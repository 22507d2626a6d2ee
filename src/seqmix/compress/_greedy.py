"""Greedy removal of sublayers: at every step the candidate goes whose removal changes the output distribution least.

    change = mean over tokens of JS(p, q),   JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2,   m = (p + q) / 2

between the next-token distributions p of the whole model and q of the pruned one. What goes into every block is kept,
so that a candidate costs only the blocks from its own on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from seqmix.compress._activations import first_inputs
from seqmix.compress._structure import Place, language_model, without
from seqmix.compress._transform import Work
from seqmix.models.backbone import LanguageModel
from seqmix.models.hf import SeqmixForCausalLM


@torch.no_grad()
def remove_greedily(
    model: SeqmixForCausalLM,
    candidates: Sequence[Sequence[Place]],
    number: int,
    ids: Tensor,
    work: Work,
    *,
    shortlist: int | None = None,
) -> list[tuple[Sequence[Place], float]]:
    """`number` of the candidates, in the order in which they went, each with the change of the output after it.

    Each candidate is the sublayers that go together. With `shortlist`, only so many are tried from the second step
    on: those that changed least when they were last tried.
    """
    inside = language_model(model)
    was_training = model.training
    model.eval()
    try:
        target = _distribution(inside, first_inputs(inside, ids), 0)
        latest = dict.fromkeys(range(len(candidates)), 0.0)
        gone: list[tuple[Sequence[Place], float]] = []
        for step in work.track(range(number), "pruning"):
            order = sorted(latest, key=latest.__getitem__)
            tried = order[:shortlist] if step and shortlist else order
            removed = [place for places, _ in gone for place in places]
            measure = partial(
                _changes, inside, model, [(i, candidates[i]) for i in tried], removed, ids, target
            )
            changes = work.remember(f"step {step}", measure)
            latest |= {int(i): change for i, change in changes}
            best = min((int(i) for i, _ in changes), key=lambda i: latest[i])
            gone.append((candidates[best], latest.pop(best)))
        return gone
    finally:
        model.train(was_training)


def _changes(
    inside: LanguageModel,
    model: SeqmixForCausalLM,
    candidates: Sequence[tuple[int, Sequence[Place]]],
    removed: Sequence[Place],
    ids: Tensor,
    target: Tensor,
) -> list[list[float]]:
    with without(model, removed):
        inputs = [first_inputs(inside, ids)]
        for block in inside.backbone.blocks:
            inputs.append(block(inputs[-1])[0])
        found = []
        for index, places in candidates:
            start = min(number for number, _ in places)
            with without(model, places):
                q = _distribution(inside, inputs[start], start)
            found.append([index, divergence(target, q)])
    return found


def _distribution(inside: LanguageModel, x: Tensor, start: int) -> Tensor:
    """Log-probabilities [N, T, vocabulary] from what goes into block `start`."""
    backbone = inside.backbone
    for block in backbone.blocks[start:]:
        x, _ = block(x)
    return inside.logits(x if backbone.norm is None else backbone.norm(x)).float().log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> float:
    """The mean Jensen-Shannon divergence in nats of log-probabilities [..., vocabulary]: from 0 to log 2."""
    mean = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    to_mean = (p.exp() * (p - mean)).sum(-1) + (q.exp() * (q - mean)).sum(-1)
    return float(to_mean.mean().clamp_min(0)) / 2
