"""Fine-tuning on one project's code: what each choice of trained parameters brings (Zlotchevski et al. 2022)."""

from __future__ import annotations

import random
import statistics
import sysconfig
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._finetuning import predictions, pretrained, tune, windows

CUSTOM = "all"
CHOICES = (CUSTOM, "head", "last", "lora", "prefix")
FEW, VERY_FEW = 0.5, 0.01  # of all parameters: what freezing most, and training a prefix, leaves
UNTUNED = "pretrained"

Table = dict[str, dict[str, float]]


def measure(run: Run) -> list[Finding]:
    rates = {choice: best_rate(run, choice) for choice in CHOICES}
    made = {
        project: {choice: tuned(run, project, choice, rates[choice]) for choice in CHOICES}
        for project in run["projects"]
    }
    losses = {
        project: {UNTUNED: untuned(run, project)}
        | {choice: made[project][choice][project] for choice in CHOICES}
        for project in run["projects"]
    }
    costs = {
        choice: run.remember(f"cost of {choice}", partial(cost, run, choice)) for choice in CHOICES
    }
    return [
        every_choice_helps(losses, rates),
        custom_is_best(losses),
        others_are_cheaper(costs, losses),
        own_project_is_best({project: made[project][CUSTOM] for project in made}),
    ]


# ---- a package of the standard library is a project


def code(project: str) -> tuple[str, str]:
    """The source of three quarters of the project's files, and that of the others."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / project
    files = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    files = [text for text in files if len(text) > 2000]
    random.Random(0).shuffle(files)
    held_out = len(files) // 4
    return "\n".join(files[held_out:]), "\n".join(files[:held_out])


def held_out_loss(run: Run, model: Any, tokenizer: Any, project: str) -> float:
    """Nats per token of the project's held-out files."""
    return predictions(model, windows(tokenizer, code(project)[1], *run["held out"]))[0]


def untuned(run: Run, project: str) -> float:
    def loss() -> float:
        return held_out_loss(run, *pretrained(run), project)

    return float(run.remember(f"{project}, {UNTUNED}", loss))


def tuned(run: Run, project: str, choice: str, rate: float) -> dict[str, float]:
    """Held-out losses, by project, of a model whose `choice` of parameters was trained on `project`.

    Of the other projects only where all parameters were trained.
    """
    from seqmix.train.parameters import select_parameters

    def losses() -> dict[str, float]:
        model, tokenizer = pretrained(run)
        model = select_parameters(model, choice)
        is_tuning = project == run["tuning project"]
        steps = run["tuning steps"] if is_tuning else run["steps"]
        rows = windows(tokenizer, code(project)[0], steps, run["length"])
        tune(model, [{"input_ids": row[None], "labels": row[None]} for row in rows], rate)
        others = run["projects"] if choice == CUSTOM and not is_tuning else []
        return {
            name: held_out_loss(run, model, tokenizer, name)
            for name in {project: None, **dict.fromkeys(others)}
        }

    return dict(run.remember(f"{project}, {choice}, rate {rate:g}", losses))


def best_rate(run: Run, choice: str) -> float:
    """The rate with the lowest held-out loss on a project that is kept for choosing."""
    project = run["tuning project"]
    return min(run["rates"][choice], key=lambda rate: tuned(run, project, choice, rate)[project])


def cost(run: Run, choice: str) -> dict[str, float]:
    from seqmix.train.parameters import select_parameters, training_cost

    model, tokenizer = pretrained(run)
    total = model.num_parameters()
    rows = windows(tokenizer, code(run["tuning project"])[0], 1, run["length"])
    found = asdict(training_cost(select_parameters(model, choice), rows))
    return found | {"share of parameters": found["parameters"] / total}


# ---- the statements


def means(losses: Table) -> dict[str, float]:
    return {
        name: statistics.fmean(row[name] for row in losses.values()) for name in (UNTUNED, *CHOICES)
    }


def every_choice_helps(losses: Table, rates: dict[str, float]) -> Finding:
    helped = {
        choice: all(row[choice] < row[UNTUNED] for row in losses.values()) for choice in CHOICES
    }
    return Finding(
        "Fine-tuning on a project predicts the project's other files better, whichever parameters are trained.",
        "each choice: on each project a lower loss on held-out files than the pretrained model's",
        {"nats per token, by project and choice": losses, "helped": helped, "rates chosen": rates},
        "reproduced" if all(helped.values()) else "not reproduced",
    )


def custom_is_best(losses: Table) -> Finding:
    mean = means(losses)
    others = {choice: mean[choice] for choice in CHOICES if choice != CUSTOM}
    return Finding(
        "Training all parameters predicts best.",
        "the lowest mean loss over the projects of all choices",
        {
            "mean nats per token": mean,
            "above custom": {name: loss - mean[CUSTOM] for name, loss in others.items()},
        },
        "reproduced" if mean[CUSTOM] < min(others.values()) else "not reproduced",
    )


def others_are_cheaper(costs: dict[str, dict[str, float]], losses: Table) -> Finding:
    mean = means(losses)
    light = [costs[choice] for choice in CHOICES if choice != CUSTOM]
    fine = (
        all(one["flops_per_token"] < costs[CUSTOM]["flops_per_token"] for one in light)
        and all(one["share of parameters"] <= FEW for one in light)
        and costs["prefix"]["share of parameters"] <= VERY_FEW
    )
    return Finding(
        "Training few parameters costs less memory and compute, a project-specific prefix the least memory.",
        f"every choice but custom trains at most {FEW} of the parameters, a prefix at most {VERY_FEW:.0%}, and takes "
        "fewer FLOPs per token",
        {
            "cost": costs,
            "FLOPs against custom": {
                choice: costs[choice]["flops_per_token"] / costs[CUSTOM]["flops_per_token"]
                for choice in CHOICES
            },
            "share of custom's gain": {
                choice: (mean[UNTUNED] - mean[choice]) / (mean[UNTUNED] - mean[CUSTOM])
                for choice in CHOICES
            },
        },
        "reproduced" if fine else "not reproduced",
    )


def own_project_is_best(made: Table) -> Finding:
    fine = all(
        made[project][project] < made[other][project]
        for project in made
        for other in made
        if other != project
    )
    return Finding(
        "What is learnt is the project, not code in general.",
        "custom: on each project a lower loss of the model tuned on it than of one tuned as long on another",
        {"nats per token by project tuned on and project predicted": made},
        "reproduced" if fine else "not reproduced",
    )


CLAIM = Claim(
    title="Exploring and Evaluating Personalized Models for Code Generation",
    paper="arXiv:2208.13928",
    claimed="A pretrained model of code is personalised to one project by training all parameters, a few (embeddings "
    "and head, the last layer) or a prefix: a trade-off between what it predicts and what it costs, with the best "
    "predictions when all are trained.",
    where="abstract; the comparison of fine-tuning strategies",
    measure=measure,
    quick={
        "model": None,
        "projects": ["json", "http"],
        "tuning project": "email",
        "steps": 4,
        "tuning steps": 2,
        "length": 32,
        "held out": [2, 32],
        "rates": {choice: [1e-2] for choice in CHOICES},
    },
    # The paper: unit tests of Java projects, a model of 406M parameters, epochs over every project.
    full={
        "model": "smollm2-135m",
        "projects": ["asyncio", "email"],
        "tuning project": "multiprocessing",
        "steps": 12,
        "tuning steps": 6,
        "length": 128,
        "held out": [6, 128],
        "rates": {
            "all": [5e-5, 2e-4],
            "head": [2e-4, 1e-3],
            "last": [2e-4, 1e-3],
            "lora": [5e-4, 2e-3],
            "prefix": [1e-2, 5e-2],
        },
    },
)
