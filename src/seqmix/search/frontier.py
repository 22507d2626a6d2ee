"""Search for the recipes that a budget allows: Optuna proposes, every proposal is made and measured.

Each metric of the budget is an objective. First every method is tried alone at every strength; then a sampler combines
them. Steps that several recipes begin with are made once, so a trial costs little more than its last step.
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
# In the order in which they are applied, since later ones replace what earlier ones want to see. They look at less text
# than by default: a search tries many.
SPACE: Mapping[str, Sequence[str]] = {
    "finercut": tuple(f"finercut:{share}(tokens=64, shortlist=8)" for share in (0.07, 0.14)),
    "blocks": tuple(f"blocks:{share}(tokens=64, shortlist=8)" for share in (0.07, 0.14)),
    "slice": ("slice:0.1(tokens=2048)", "slice:0.2(tokens=2048)"),
    "low_rank": ("low_rank:0.1(tokens=1024)", "low_rank:0.25(tokens=1024)"),
    "int8": ("int8",),
}


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

    def dominated_methods(self) -> dict[str, str | None]:
        """For each method, a recipe of several that dominates it at one of its strengths, or None."""
        worked = [trial for trial in self.trials if not trial.failed]
        several = [trial for trial in worked if "|" in trial.recipe]
        found: dict[str, str | None] = {}
        for method, choices in SPACE.items():
            alone = [t for t in worked if t.recipe in map(_written, choices)]
            better = (o.recipe for t in alone for o in several if dominates(o, t, self.metrics))
            found[method] = next(better, None)
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "trials": [asdict(trial) for trial in self.trials],
            "metrics": list(self.metrics),
            "frontier": [trial.recipe for trial in self.frontier()],
            "dominated methods": self.dominated_methods(),
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
        for method, choices in SPACE.items():
            for choice in choices:
                study.enqueue_trial({m: choice if m == method else "" for m in SPACE})
        *others, last = SPACE  # the last keeps weights in another way, which goes with all others
        for method in others:
            pair = {method: SPACE[method][0], last: SPACE[last][0]}
            study.enqueue_trial({**dict.fromkeys(SPACE, ""), **pair})

    def objective(trial: Any) -> list[float]:
        chosen = [trial.suggest_categorical(m, ["", *choices]) for m, choices in SPACE.items()]
        recipe = _written(" | ".join(choice for choice in chosen if choice))
        result = tried(bench, recipe, limits)
        trial.set_user_attr("trial", json.dumps(asdict(result)))
        bench.say(f"trial {trial.number + 1} of {trials}: {_told(result, metrics)}")
        if result.failed:
            raise optuna.TrialPruned(result.failed)
        return [result.relative[metric] for metric in metrics]

    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    left = trials - len(study.get_trials(deepcopy=False, states=finished))
    if left > 0:
        study.optimize(objective, n_trials=left)
    done = [
        Trial(**json.loads(t.user_attrs["trial"])) for t in study.trials if "trial" in t.user_attrs
    ]
    unique = list({trial.recipe: trial for trial in done if trial.recipe}.values())
    worked = [trial for trial in unique if not trial.failed]
    if not worked:
        raise ConfigError(
            f"None of {len(unique)} recipes can be applied to this model: {unique[0].failed if unique else ''}"
        )
    order = [m for m in ("loss", "perplexity", "bits_per_byte") if m in metrics] or metrics[:1]
    best = min(worked, key=lambda trial: (trial.excess, trial.relative[order[0]]))
    return Trials(unique, metrics, best.recipe)


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
        seconds=1.0,
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
