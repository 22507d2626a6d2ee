"""Which architecture and which pretraining objective generalise to new tasks (Wang et al. 2022)."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqmix.claims._answers import Answer
from seqmix.claims._claim import Claim, Finding, Run, Verdict, compare_groups
from seqmix.models.backbone import ModelSpec
from seqmix.objectives import OBJECTIVES, Objective, target_logits

VALUES = 8  # of every attribute, each a token of its own
SHARES = (1 / 3, 2 / 3)  # of the steps from scratch, that adaptations get
# What reads the source (causal: as the target; prefix, encoder-decoder: in both directions), and the objective.
GRID = {
    "causal, autoregressive": ("causal", "causal"),
    "prefix, autoregressive": ("prefix", "prefix"),
    "encoder-decoder, autoregressive": ("encoder-decoder", "prefix"),
    "causal, masked": ("causal", "span_denoising"),
    "prefix, masked": ("prefix", "span_denoising"),
    "encoder-decoder, masked": ("encoder-decoder", "span_denoising"),
}
FIRST = "causal, autoregressive"
NATIVE, ADAPTED = "prefix, masked", "prefix, masked, adapted"
SIGHTED = (NATIVE, "encoder-decoder, masked")


class World:
    """Things with attributes, and texts about them: "thing attribute value ." or "attribute thing value ."

    A task is to give the value of one attribute, as a text goes on after one of both beginnings. The last attributes
    are in the texts, but not in multitask fine-tuning.
    """

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.seed = run, seed
        self.things, self.attributes = run["things"], run["attributes"]
        self.first_value = self.things + self.attributes
        self.stop = self.first_value + self.attributes * VALUES
        self.marks = self.stop + 1
        self.vocabulary = self.marks + 8
        draw = np.random.default_rng(seed)
        self.truth = draw.integers(0, VALUES, (self.things, self.attributes))

    @property
    def seen(self) -> range:
        return range(self.attributes - self.run["unseen"])

    @property
    def unseen(self) -> range:
        return range(self.attributes - self.run["unseen"], self.attributes)

    def sentences(self, shape: tuple[int, int], draw: np.random.Generator, asked: range) -> Tensor:
        """[N, sentences, 4] tokens."""
        thing = draw.integers(0, self.things, shape)
        attribute = draw.integers(asked.start, asked.stop, shape)
        swapped = draw.integers(0, 2, shape).astype(bool)
        names = self.things + attribute
        value = self.first_value + VALUES * attribute + self.truth[thing, attribute]
        words = [
            np.where(swapped, names, thing),
            np.where(swapped, thing, names),
            value,
            np.full(shape, self.stop),
        ]
        return torch.from_numpy(np.stack(words, axis=2))

    def texts(self, count: int, split: int) -> Tensor:
        draw = np.random.default_rng([self.seed, split])
        shape = (count, self.run["sentences"])
        return self.sentences(shape, draw, range(self.attributes)).flatten(1)

    def prompts(self, count: int, split: int, asked: range) -> Tensor:
        """A text, and the first words of a sentence about one of the attributes, and its value: [N, T]."""
        draw = np.random.default_rng([self.seed, split])
        told = self.texts(count, split)[:, : 4 * self.run["told"]]
        return torch.cat([told, self.sentences((count, 1), draw, asked)[:, 0, :3]], dim=1)


def new_model(run: Run, world: World, architecture: str, seed: int) -> Any:
    """As in the paper an encoder-decoder has the blocks twice, so that a token costs the same everywhere."""
    from seqmix.convert.causality import redirect
    from seqmix.models.hf import create
    from seqmix.models.seq2seq import SeqmixForSeq2SeqLM

    spec = ModelSpec(
        layout=f"{run['depth']}x[attention]", width=run["width"], vocabulary=world.vocabulary
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "encoder-decoder":
            layout = f"{run['depth']}x[bidirectional_attention]"
            encoder = ModelSpec(layout=layout, width=run["width"], vocabulary=world.vocabulary)
            return SeqmixForSeq2SeqLM.create(encoder, spec, decoder_start_token_id=world.stop)
        return redirect(create(spec), "causal" if architecture == "causal" else "prefix")


def objective(world: World, name: str) -> Objective:
    kind: type[Objective] = OBJECTIVES.get(name)
    options = {"first_mark": world.marks} if name == "span_denoising" else {}
    return kind(kind.Config.from_dict(options))


def trained(
    run: Run, world: World, model: Any, name: str, seed: int, *, share: float = 1.0
) -> dict[str, Any]:
    """The model after so large a share of the steps of pretraining, and its loss on new texts."""
    from seqmix.train.objective import objective_loss, train_objective

    goal = objective(world, name)
    train_objective(
        model,
        world.texts(run["texts"], 1),
        goal,
        steps=round(share * run["steps"]),
        batch=run["batch"],
        learning_rate=run["learning_rate"],
        seed=seed,
    )
    loss = objective_loss(model, world.texts(run["tests"], 2), goal)
    return {"model": model, "loss": loss}


@torch.no_grad()
def accuracy(run: Run, world: World, model: Any, asked: range, *, marked: bool = False) -> float:
    """Share of prompts after which the true value is the likeliest of its attribute; `marked` puts a mark in its place,
    as in span denoising."""
    prompts = world.prompts(run["tests"], 3, asked)
    source, target = prompts[:, :-1], prompts[:, -1:]
    if marked:
        mark = torch.full_like(target, world.marks)
        source, target = torch.cat([source, mark], dim=1), torch.cat([mark, target], dim=1)
    logits = target_logits(model, source, target)[:, -1, world.first_value : world.stop]
    value = prompts[:, -1] - world.first_value
    options = logits.unflatten(1, (-1, VALUES))[torch.arange(len(value)), value // VALUES]
    return float((options.argmax(-1) == value % VALUES).double().mean())


def judged(run: Run, world: World, model: Any, name: str, seed: int) -> dict[str, float]:
    """Accuracy on the tasks that fine-tuning leaves out, before it and after it."""
    from seqmix.train.objective import train_objective

    found = {"pretrained": accuracy(run, world, model, world.unseen)}
    if name == "span_denoising":
        found["pretrained, marked"] = accuracy(run, world, model, world.unseen, marked=True)
    train_objective(
        model,
        world.prompts(run["texts"], 4, world.seen),
        Answer(tokens=1),
        steps=run["tuning_steps"],
        batch=run["batch"],
        learning_rate=run["tuning_rate"],
        seed=seed,
    )
    found["fine-tuned"] = accuracy(run, world, model, world.unseen)
    found["fine-tuned, seen tasks"] = accuracy(run, world, model, world.seen)
    return found


def grid(run: Run, seed: int) -> dict[str, Any]:
    """All architectures with all objectives, and both adaptations."""
    import copy

    from seqmix.convert.causality import redirect

    world, table, made = World(run, seed), {}, {}
    for name, (architecture, goal) in GRID.items():
        made[name] = trained(run, world, new_model(run, world, architecture, seed), goal, seed)
        table[name] = judged(run, world, copy.deepcopy(made[name]["model"]), goal, seed)
    adaptations = {}
    for start, end, direction in ((FIRST, NATIVE, "prefix"), (NATIVE, FIRST, "causal")):
        goal, losses = GRID[end][1], {}
        for share in SHARES:
            model = redirect(made[start]["model"], direction)
            losses[share] = (adapted := trained(run, world, model, goal, seed, share=share))["loss"]
        adaptations[end] = {"from scratch": made[end]["loss"], "adapted": losses}
        if end == NATIVE:
            table[ADAPTED] = judged(run, world, adapted["model"], goal, seed)
    return {"accuracy": table, "loss": adaptations}


def cost(found: list[dict[str, Any]], end: str) -> tuple[dict[str, Any], Verdict]:
    """Mean losses after each share of the steps, and whether one is as low as from scratch."""
    scratch = statistics.fmean(one["loss"][end]["from scratch"] for one in found)
    adapted = {
        share: statistics.fmean(one["loss"][end]["adapted"][str(share)] for one in found)
        for share in SHARES
    }
    reached = [share for share, loss in adapted.items() if loss <= scratch]
    measured = {
        "loss from scratch": scratch,
        "loss adapted, by share of the steps": {f"{share:.2f}": adapted[share] for share in SHARES},
        "times as fast, at least": 1 / reached[0] if reached else None,
    }
    return measured, "reproduced" if reached else "not reproduced"


def measure(run: Run) -> list[Finding]:
    found = [
        run.remember(f"seed {seed}", lambda s=seed: grid(run, s)) for seed in range(run["seeds"])
    ]

    def table(when: str) -> dict[str, list[float]]:
        names = [*GRID, ADAPTED]
        tables = [one["accuracy"] for one in found]
        return {n: [one[n][when] for one in tables] for n in names if when in tables[0][n]}

    before, after = table("pretrained"), table("fine-tuned")

    def best(values: dict[str, list[float]], names: Any) -> list[float]:
        return max((values[name] for name in names), key=statistics.fmean)

    spread = "beyond two standard errors over seeds"
    to_causal, to_prefix = cost(found, FIRST), cost(found, NATIVE)
    return [
        Finding(
            "After pretraining alone, a causal decoder with an autoregressive objective does new tasks best.",
            f"accuracy on prompts of the tasks kept out: above the best of the five others, {spread}",
            {
                "accuracy": {name: before[name] for name in GRID},
                "accuracy with a mark where the answer goes": table("pretrained, marked"),
                "chance": 1 / VALUES,
            },
            compare_groups(before[FIRST], best(before, [n for n in GRID if n != FIRST])),
        ),
        Finding(
            "After multitask fine-tuning, what reads its input in both directions and was pretrained by masking does.",
            f"accuracy on the tasks kept out: the better of both kinds above the best of the four others, {spread}",
            {
                "accuracy": {name: after[name] for name in GRID},
                "accuracy on tasks of the fine-tuning": table("fine-tuned, seen tasks"),
            },
            compare_groups(
                best(after, SIGHTED), best(after, [n for n in GRID if n not in SIGHTED])
            ),
        ),
        Finding(
            "A masked prefix decoder becomes an autoregressive causal one at less cost than training it anew.",
            f"the loss from scratch, after at most {SHARES[-1]:.2f} of its steps (paper: 1 / 1.6)",
            *to_causal,
        ),
        Finding(
            "A causal autoregressive decoder becomes a masked prefix decoder at less cost than training it anew.",
            f"the loss from scratch, after at most {SHARES[-1]:.2f} of its steps (paper: 1 / 3.3)",
            *to_prefix,
        ),
        Finding(
            "After multitask fine-tuning, the adapted causal decoder keeps up with one that was masked from the start.",
            "accuracy on the tasks kept out: not lower beyond two standard errors over seeds",
            {name: after[name] for name in (NATIVE, ADAPTED)},
            "not reproduced"
            if compare_groups(after[NATIVE], after[ADAPTED]) == "reproduced"
            else "reproduced",
        ),
    ]


CLAIM = Claim(
    title="What Language Model Architecture and Pretraining Objective Work Best for Zero-Shot Generalization?",
    paper="arXiv:2204.05832",
    claimed="After pretraining alone, causal decoders with an autoregressive objective generalise best to new tasks; "
    "after multitask fine-tuning, models that read their input in both directions and were pretrained by masking do; "
    "and either kind is adapted into the other for less than it costs to train. Here: models of 0.1 M parameters on "
    "texts of invented facts, whose tasks are questions about one attribute each.",
    where="sections 4 and 5",
    measure=measure,
    quick={
        "things": 4,
        "attributes": 3,
        "unseen": 1,
        "sentences": 4,
        "told": 1,
        "texts": 64,
        "tests": 32,
        "width": 16,
        "depth": 1,
        "batch": 4,
        "learning_rate": 5e-3,
        "steps": 3,
        "tuning_steps": 2,
        "tuning_rate": 2e-3,
        "seeds": 1,
    },
    full={
        "things": 32,
        "attributes": 6,
        "unseen": 2,
        "sentences": 8,
        "told": 3,
        "texts": 8000,
        "tests": 1024,
        "width": 48,
        "depth": 2,
        "batch": 32,
        "learning_rate": 5e-3,
        "steps": 180,
        "tuning_steps": 60,
        "tuning_rate": 2e-3,
        "seeds": 3,
    },
)
