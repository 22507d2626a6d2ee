"""Search for the recipes that a budget allows: Optuna proposes, every proposal is made and measured.

Each metric of the budget is an objective. First every method is tried alone at every strength, then each with the
methods that go with all others, and then a sampler combines them. Steps that several recipes begin with are made once,
an order in which sublayers go is found once for all amounts, and only times that the budget names are taken: so a trial
costs its last step and the evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from seqmix.compress import parse_recipe
from seqmix.core import extras
from seqmix.core.errors import ConfigError
from seqmix.measure.budget import Term, parse_budget
from seqmix.measure.footprint import footprints
from seqmix.search._workbench import Workbench

METRICS = {
    "loss": "held-out loss in nats per token",
    "perplexity": "held-out perplexity per token",
    "bits_per_byte": "held-out loss in bits per byte of text",
    "zero_shot": "share of right answers of the zero-shot set",
    "passkey": "share of passkeys retrieved",
    "latency": "milliseconds per decoded token",
    "prefill": "milliseconds to read a text",
    "size_mb": "MiB of weights as stored",
    "parameters": "numbers stored",
    "flops": "operations of one decoded token",
    "state_mb": "MiB that a model keeps of one text",
}
FIGURES = {
    "latency": "decode_ms",
    "prefill": "prefill_ms",
}  # names in the figures, where they differ
MORE_IS_BETTER = ("zero_shot", "passkey")
# In the order in which they are applied, since later ones replace what earlier ones want to see: `recover` trains dense
# layers, and `low_rank` leaves none. They look at less text than by default: a search tries many.
SPACE: Mapping[str, Sequence[str]] = {
    "finercut": tuple(f"finercut:{share}(tokens=256)" for share in (0.1, 0.2)),
    "blocks": tuple(f"blocks:{share}(tokens=256)" for share in (0.1, 0.2)),
    "slice": tuple(f"slice:{share}(tokens=1024)" for share in (0.1, 0.2)),
    "recover": tuple(f"recover:{tokens}(distillation=0.0)" for tokens in (2048, 8192)),
    "low_rank": tuple(f"low_rank:{share}(tokens=1024)" for share in (0.1, 0.25)),
    "int8": ("int8",),
}
COMPANIONS = ("recover", "int8")  # go with all others, and make up for what these lose


def parse_limits(budget: str | None) -> tuple[Term, ...]:
    """The terms of a budget of `seqmix compress`; raises `BudgetError`."""
    return parse_budget(budget, METRICS, (), relative=True)


@dataclass(frozen=True)
class Trial:
    """One recipe: its figures as shares of the original's, and by how much it misses the budget, or why it failed."""

    recipe: str
    relative: Mapping[str, float] = field(default_factory=dict)
    excess: float = 0.0
    failed: str | None = None


@dataclass(frozen=True)
class Trials:
    """All trials of a search, and the recipe that was chosen."""

    trials: Sequence[Trial]
    metrics: Sequence[str]
    chosen: str

    def frontier(self) -> list[Trial]:
        """Those that no other is at least as good as in every metric and better in one."""
        worked = [trial for trial in self.trials if not trial.failed]
        return [t for t in worked if not any(dominates(o, t, self.metrics) for o in worked)]

    def methods(self) -> list[dict[str, str | None]]:
        """Every method alone, at each strength that was tried: its name, its recipe, and a combination on the frontier
        that dominates it, or None."""
        tried = {trial.recipe: trial for trial in self.trials if not trial.failed}
        several = [trial for trial in self.frontier() if "|" in trial.recipe]
        rows: list[dict[str, str | None]] = []
        for method, choices in SPACE.items():
            for recipe in map(_written, choices):
                if recipe in tried:
                    better = (
                        o.recipe for o in several if dominates(o, tried[recipe], self.metrics)
                    )
                    rows.append(
                        {"method": method, "recipe": recipe, "dominated by": next(better, None)}
                    )
        return rows

    def to_dict(self) -> dict[str, Any]:
        return {
            "trials": [asdict(trial) for trial in self.trials],
            "metrics": list(self.metrics),
            "frontier": [trial.recipe for trial in self.frontier()],
            "methods": self.methods(),
            "chosen": self.chosen,
        }


def dominates(one: Trial, other: Trial, metrics: Sequence[str]) -> bool:
    """Whether `one` is at least as good in every metric and better in one."""
    signs = [-1.0 if metric in MORE_IS_BETTER else 1.0 for metric in metrics]
    pairs = [
        (s * one.relative[m], s * other.relative[m]) for s, m in zip(signs, metrics, strict=True)
    ]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def find_frontier(bench: Workbench, limits: Sequence[Term], *, trials: int, seed: int) -> Trials:
    """Tries `trials` recipes; the study is kept in the bench's folder, so that a stopped search goes on."""
    optuna = extras.require("optuna", extra="compare")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    metrics = list(dict.fromkeys(term.metric for term in limits))
    bench.folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{bench.folder / 'search.db'}",
        study_name="compress",
        load_if_exists=True,
        directions=["maximize" if m in MORE_IS_BETTER else "minimize" for m in metrics],
        sampler=optuna.samplers.NSGAIISampler(population_size=8, seed=seed),
    )
    if not study.trials:
        for chosen in first_trials():
            study.enqueue_trial(dict.fromkeys(SPACE, "") | chosen)
    known = {t.recipe: t for t in _results(study)}

    def objective(trial: Any) -> list[float]:
        chosen = [trial.suggest_categorical(m, ["", *choices]) for m, choices in SPACE.items()]
        recipe = _written(" | ".join(choice for choice in chosen if choice))
        result = known.get(recipe) or tried(bench, recipe, limits)
        known[recipe] = result
        trial.set_user_attr("trial", json.dumps(asdict(result)))
        bench.say(f"trial {trial.number + 1} of {trials}: {_told(result, metrics)}")
        if result.failed:
            raise optuna.TrialPruned(result.failed)
        return [result.relative[metric] for metric in metrics]

    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    left = trials - len(study.get_trials(deepcopy=False, states=finished))
    if left > 0:
        study.optimize(objective, n_trials=left)
    unique = [trial for trial in known.values() if trial.recipe]
    worked = [trial for trial in unique if not trial.failed]
    if not worked:
        raise ConfigError(
            f"None of {len(unique)} recipes can be applied to this model: {unique[0].failed if unique else ''}"
        )
    order = [m for m in ("loss", "perplexity", "bits_per_byte") if m in metrics] or metrics[:1]
    best = min(worked, key=lambda trial: (trial.excess, trial.relative[order[0]]))
    return Trials(unique, metrics, best.recipe)


def first_trials() -> list[dict[str, str]]:
    """Choices by method: each alone at every strength, then the companions together, and these with each other one."""
    companions = {method: SPACE[method][-1] for method in COMPANIONS if method in SPACE}
    alone = [{method: choice} for method, choices in SPACE.items() for choice in choices]
    beside = [{m: SPACE[m][0]} | companions for m in SPACE if m not in COMPANIONS]
    return [*alone, *([companions] if len(companions) > 1 else []), *beside]


def _results(study: Any) -> list[Trial]:
    rows = (trial.user_attrs.get("trial") for trial in study.trials)
    return [Trial(**json.loads(row)) for row in rows if row is not None]


def tried(bench: Workbench, recipe: str, limits: Sequence[Term]) -> Trial:
    """Makes one recipe and measures it beside the original."""
    original = bench.make([])
    try:
        made = bench.make(parse_recipe(recipe)) if recipe else original
    except ConfigError as error:
        return Trial(recipe, failed=str(error))
    sizes = footprints(
        {"original": original.model.model, "made": made.model.model},
        context=bench.settings.context,
        seconds=4.0,
        rounds=20,
        times=[FIGURES.get(term.metric, term.metric) for term in limits],
    )
    first = {**original.record["quality"], **sizes["original"]}
    figures = {**made.record["quality"], **sizes["made"]}
    found, shares = {}, {}
    for metric in METRICS:
        name = FIGURES.get(metric, metric)
        if name in figures:
            found[metric] = figures[name]
            shares[metric] = figures[name] / first[name] if first[name] else 1.0
    excess = sum(term.excess(shares if term.relative else found) for term in limits)
    return Trial(recipe, shares, excess)


def _written(recipe: str) -> str:
    from seqmix.compress import write_recipe

    return write_recipe(parse_recipe(recipe)) if recipe else ""


def _told(trial: Trial, metrics: Sequence[str]) -> str:
    if trial.failed:
        return f"{trial.recipe}: {trial.failed}"
    figures = ", ".join(f"{metric} {trial.relative[metric]:.3f}x" for metric in metrics)
    return f"{trial.recipe or 'the original'}: {figures}"
