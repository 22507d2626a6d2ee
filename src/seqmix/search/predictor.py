"""Search by predictors: few models are measured, thousands are guessed.

    y = w . x + c        x: one 0 or 1 per choice, w: least squares with a penalty lambda |w|^2

In turns: a linear predictor per objective is fitted to what has been measured, NSGA-II looks for the front of the
predictions, and some of that front are measured. Size is linear in the choices, and loss and latency nearly so.
Cummings et al. 2022 (arXiv:2205.10358), algorithm 1, the search that Sridhar et al. 2023 (arXiv:2312.13301) use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seqmix.core import extras
from seqmix.core.errors import ConfigError
from seqmix.search.policy import Policy, Space

PENALTIES = tuple(10.0**power for power in range(-4, 3))
POPULATION = 32


@dataclass(frozen=True)
class Linear:
    """What predicts one figure from the features of a policy."""

    weight: Tensor
    constant: float

    @classmethod
    def fit(cls, x: Tensor, y: Tensor) -> Linear:
        """From policies x [N, F] and figures y [N]; the penalty is the one with the least error on policies left out
        one by one."""
        mean, center = x.mean(0), float(y.mean())
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
        turned = (x - mean) @ vectors
        best, least = x.new_zeros(x.shape[1]), math.inf
        for penalty in PENALTIES:
            shrunk = turned / (values.clamp_min(0) + penalty)
            weight = shrunk.T @ (y - center)
            leverage = (turned * shrunk).sum(1) + 1 / len(x)
            error = ((y - center - turned @ weight) / (1 - leverage).clamp_min(1e-6)).square().sum()
            if float(error) < least:
                best, least = vectors @ weight, float(error)
        return cls(best, center - float(best @ mean))

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.constant


@dataclass(frozen=True)
class Measured:
    """A policy, its figures, and what had been predicted before it was measured."""

    policy: Policy
    figures: Mapping[str, float]
    predicted: Mapping[str, float] = field(default_factory=dict)


def search_policies(
    space: Space,
    measure: Callable[[Policy], Mapping[str, float]],
    *,
    first: Sequence[Policy],
    rounds: int = 3,
    per_round: int = 8,
    guesses: int = 300,
    seed: int = 0,
) -> list[Measured]:
    """Everything that was measured, in order; less is better in every figure.

    `first` policies are measured to begin with, then `per_round` of the predicted front in every round.
    """
    if len(first) < 2 or min(rounds, per_round, guesses) < 1:
        raise ConfigError(
            f"search_policies: {len(first)} first policies, rounds={rounds}, per_round={per_round}, "
            f"guesses={guesses}, wanted at least 2 policies and at least 1 of each."
        )
    found = [Measured(policy, measure(policy)) for policy in dict.fromkeys(first)]
    for turn in range(rounds):
        x = torch.stack([space.features(m.policy) for m in found])
        names = list(found[0].figures)
        predictors = {
            name: Linear.fit(x, torch.tensor([m.figures[name] for m in found], dtype=x.dtype))
            for name in names
        }
        known = {m.policy for m in found}
        front = [
            p for p in predicted_front(space, predictors, guesses, seed + turn) if p not in known
        ]
        for place in torch.linspace(0, len(front) - 1, min(per_round, len(front))).round().tolist():
            policy = front[int(place)]
            features = space.features(policy)
            guess = {name: float(predictors[name](features)) for name in names}
            found.append(Measured(policy, measure(policy), guess))
    return found


def predicted_front(
    space: Space, predictors: Mapping[str, Linear], guesses: int, seed: int
) -> list[Policy]:
    """The policies that no other of the guessed ones beats in every prediction, by the first of them."""
    optuna = extras.require("optuna", extra="compare")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["minimize"] * len(predictors),
        sampler=optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed),
    )

    def objective(trial: object) -> list[float]:
        policy = tuple(
            trial.suggest_int(name, 0, len(choices) - 1)  # type: ignore[attr-defined]
            for name, choices in space.genes.items()
        )
        return [float(predictor(space.features(policy))) for predictor in predictors.values()]

    study.optimize(objective, n_trials=guesses)
    best = sorted(study.best_trials, key=lambda trial: trial.values[0])
    return list(dict.fromkeys(tuple(t.params[name] for name in space.genes) for t in best))


def front(found: Sequence[Measured]) -> list[Measured]:
    """Those that no other beats."""
    return [m for m in found if not any(beats(o.figures, m.figures) for o in found)]


def beats(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether `one` is at least as good in every figure and better in one."""
    pairs = [(one[name], other[name]) for name in one]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
