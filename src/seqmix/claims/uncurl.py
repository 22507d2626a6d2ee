"""UNCURL: how far the experts of a mixture can be merged for one task (Sarkar et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._classifier import HERE, mean

DEGRADED = 0.01  # of the loss, above that of the unpruned model


class Domain:
    """Windows [N, T] of the bytes of one corpus, the last tenth for tests."""

    def __init__(self, corpus: str, run: Run) -> None:
        from seqmix.data.text import read_text

        content = bytearray("\n".join(read_text(corpus).documents).encode())
        rows = torch.frombuffer(content, dtype=torch.uint8)
        rows = rows[: len(rows) // run["length"] * run["length"]].view(-1, run["length"])
        end = int(0.9 * len(rows))
        self.train = rows[:end]
        self.test = rows[torch.linspace(end, len(rows) - 1, run["tests"]).long()].long()


def measure(run: Run) -> list[Finding]:
    domains = [Domain(corpus, run) for corpus in run["corpora"]]
    seeds = [
        run.remember(f"seed {seed}", lambda s=seed: losses(run, domains, s))
        for seed in range(run["seeds"])
    ]
    return findings(run, seeds)


def losses(run: Run, domains: list[Domain], seed: int) -> dict[str, list[float]]:
    """Held-out loss on every domain, after tuning on it: of models trained with `E` experts, and of those pruned to
    `E -> e` in two ways.
    """
    from seqmix.models.hf import create

    found: dict[str, list[float]] = {}
    for experts in sorted({*run["smaller"], *run["experts"]}):
        layout = f"{run['depth']}x[attention/mixture_of_experts(experts={experts}, active=1, hidden={run['hidden']})]"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = create(layout, width=run["width"], heads=4, vocabulary=256)
        train(run, model, [d.train for d in domains], run["steps"], run["learning_rate"], seed)

        def tuned(make: Callable[[Domain], Any], seed: int = seed) -> list[float]:
            return [after_tuning(run, make(domain), domain, seed) for domain in domains]

        found[f"{experts}"] = tuned(lambda _, model=model: model)
        for left in run["smaller"]:
            if left < experts and experts in run["experts"]:
                name = f"{experts} -> {left}"
                found[f"{name}, merged"] = tuned(
                    lambda d, model=model, f=experts / left: merged(run, model, d, f)
                )
                found[f"{name}, dropped"] = tuned(
                    lambda d, model=model, left=left: dropped(run, model, d, left)
                )
    return found


def train(run: Run, model: Any, texts: list[Tensor], steps: int, rate: float, seed: int) -> None:
    """Trains in place on windows drawn from all texts alike."""
    from seqmix.train.loop import run as train_on
    from seqmix.train.plan import Plan

    plan = Plan(
        steps=steps,
        tokens_per_step=run["batch"] * run["length"],
        learning_rate=rate,
        seed=seed,
        progress=False,
    )

    def draw(index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed * 2**32 + index)
        size = run["batch"] // len(texts)
        rows = [text[torch.randint(len(text), (size,), generator=generator)] for text in texts]
        ids = torch.cat(rows).long()
        return {"input_ids": ids, "labels": ids}

    train_on(model, draw, plan)


def after_tuning(run: Run, model: Any, domain: Domain, seed: int) -> float:
    import copy

    model = copy.deepcopy(model)
    train(run, model, [domain.train], run["tuning_steps"], run["tuning_rate"], seed + 100)
    with torch.no_grad():
        return float(model(input_ids=domain.test, labels=domain.test, use_cache=False).loss)


def calibration(run: Run, domain: Domain) -> Any:
    from seqmix.compress import Calibration

    rows = torch.linspace(0, len(domain.train) - 1, run["rows"]).long()
    return Calibration(windows=domain.train[rows].long())


def merged(run: Run, model: Any, domain: Domain, factor: float) -> Any:
    from seqmix.compress import TRANSFORMS, Work

    tokens = run["rows"] * run["length"]
    return TRANSFORMS.get("uncurl")(factor=factor, tokens=tokens).fit(
        model, calibration(run, domain), Work()
    )


def dropped(run: Run, model: Any, domain: Domain, left: int) -> Any:
    """Only the experts that most tokens of the domain choose stay: the paper's naive baseline."""
    from seqmix.compress import TRANSFORMS, Work
    from seqmix.compress._cut import cut

    work = Work()
    tokens = run["rows"] * run["length"]
    TRANSFORMS.get("uncurl")(factor=1.0, tokens=tokens).fit(model, calibration(run, domain), work)
    kept = {}
    for name, found in work.notes["experts"].items():
        number, part = name.split()
        order = torch.tensor(found["load"]).argsort(descending=True, stable=True)
        kept[int(number), part] = sorted(order[:left].tolist())
    return cut(model, kept)


def findings(run: Run, seeds: list[dict[str, list[float]]]) -> list[Finding]:
    table = {name: mean([mean(s[name]) for s in seeds]) for name in seeds[0]}

    def rise(experts: int, left: int) -> float:
        return table[f"{experts} -> {left}, merged"] / table[f"{experts}"] - 1

    pairs = [(e, left) for e in run["experts"] for left in run["smaller"] if left < e]
    rises = {f"{e} -> {left}": rise(e, left) for e, left in pairs}
    threshold = {
        str(e): max([1.0, *(e / n for m, n in pairs if m == e and rise(e, n) <= DEGRADED)])
        for e in run["experts"]
    }
    exceeded = [e for e in run["experts"] if threshold[str(e)] < e / min(run["smaller"])]
    differences = len(set(threshold.values())) > 1
    by_seed = [
        [mean([mean(s[f"{e} -> {n}, {way}"]) for e, n in pairs]) for s in seeds]
        for way in ("dropped", "merged")
    ]
    halves = {f"{e} -> {e // 2}": (e, e // 2) for e in run["experts"] if e // 2 in run["smaller"]}
    scratch = [mean([mean(s[f"{n}"]) for _, n in halves.values()]) for s in seeds]
    half = [mean([mean(s[f"{e} -> {n}, merged"]) for e, n in halves.values()]) for s in seeds]
    worse = compare_groups(half, scratch)
    return [
        Finding(
            "There is a factor of reduction above which a task's quality falls.",
            f"with the most experts, a loss within {DEGRADED:.0%} of the unpruned model's at some factor of at least "
            "2, and above it at the largest factor",
            {"losses": table, "rise over the unpruned model": rises, "threshold": threshold},
            "reproduced"
            if max(run["experts"]) in exceeded and threshold[str(max(run["experts"]))] >= 2
            else "not reproduced",
        ),
        Finding(
            "The threshold depends on the number of experts in pretraining.",
            "the largest factors within that margin are not the same for all numbers of experts",
            {"threshold": threshold},
            "reproduced" if differences else "not reproduced",
        ),
        Finding(
            "Halving the experts is at least as good as training the smaller mixture from scratch.",
            "loss of E -> E/2, mean over E and tasks, not above that of E/2 from scratch by two standard errors over "
            "seeds",
            {"merged": half, "from scratch": scratch},
            "not reproduced" if worse == "reproduced" else "reproduced",
        ),
        Finding(
            "Merging clusters keeps more than keeping the experts that are chosen most.",
            "a lower loss, mean over all reductions and tasks, beyond two standard errors over seeds",
            {"dropped": by_seed[0], "merged": by_seed[1]},
            compare_groups(*by_seed),
        ),
    ]


CLAIM = Claim(
    title="Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning",
    paper="arXiv:2409.01483",
    claimed="Merging the experts of a pretrained mixture for one task works up to a threshold factor that depends on "
    "their number, there matches smaller mixtures trained from scratch, and beats keeping the most used experts. "
    "Here: models of bytes with 4 to 16 small experts, plays and Python code as tasks, all tuned shortly on the task.",
    where="abstract, and summaries of its experiments (354 M parameters, 8 to 128 experts, SuperGLUE)",
    measure=measure,
    quick={
        "corpora": [str(HERE / "ops"), str(HERE / "channels")],
        "length": 16,
        "tests": 4,
        "rows": 4,
        "experts": [4],
        "smaller": [2],
        "depth": 1,
        "width": 16,
        "hidden": 8,
        "batch": 4,
        "steps": 3,
        "learning_rate": 3e-3,
        "tuning_steps": 2,
        "tuning_rate": 1e-3,
        "seeds": 1,
    },
    full={
        "corpora": ["shakespeare", "python_code"],
        "length": 64,
        "tests": 256,
        "rows": 64,
        "experts": [4, 8, 16],
        "smaller": [2, 4, 8],
        "depth": 2,
        "width": 64,
        "hidden": 64,
        "batch": 16,
        "steps": 200,
        "learning_rate": 3e-3,
        "tuning_steps": 12,
        "tuning_rate": 1e-3,
        "seeds": 2,
    },
)
