"""DiffuCoder: in which order a masked diffusion model writes code, and reinforcement with coupled masks (2025)."""

from __future__ import annotations

import copy
import random
import statistics
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._training import QUICK_TEXT

SPANS = (1, 2, 3)  # k of both measures
LETTER, MASK = 4, 5  # words of expressions, behind two kinds of brackets: ( ) [ ]
NUMBERS = 6  # words that ask for 0, 1, ... pairs of brackets
BYTE_MASK = 258


class Expressions:
    """Expressions of letters and two kinds of brackets, which are to be nested rightly, such as `( x [ ] ) x`.

    A prompt [B, 1] is the number of pairs that an answer is to have; what has it and parses passes.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.prompts = NUMBERS + torch.arange(tokens // 2 + 1).unsqueeze(1)

    def passed(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """The reward [B], 0 or 1."""
        wanted = (prompts[:, 0] - NUMBERS).tolist()
        found = [self.pairs(row) for row in answers.tolist()]
        return torch.tensor([float(a == b) for a, b in zip(found, wanted, strict=True)])

    def pairs(self, words: list[int]) -> int | None:
        """How many pairs of brackets an expression has; None for what is none."""
        opened: list[int] = []
        for word in words:
            if word < LETTER and word % 2 == 0:
                opened.append(word)
            elif word < LETTER and (not opened or opened.pop() != word - 1):
                return None
        return None if opened else sum(word < LETTER for word in words) // 2

    def texts(self, count: int, seed: int) -> Tensor:
        """Prompts with random answers that pass [N, 1 + tokens], as many of each number of pairs."""
        draw = random.Random(seed)
        rows: list[list[int]] = []
        while len(rows) < count:
            pairs = len(rows) % len(self.prompts)
            words: list[int] = []
            for _ in range(pairs):  # each pair encloses a part of what there is
                begin, end = sorted(draw.randint(0, len(words)) for _ in range(2))
                kind = draw.choice((0, 2))
                inside = [kind, *words[begin:end], kind + 1]
                if self.pairs(inside) is not None:
                    words[begin:end] = inside
                else:
                    words[end:end] = [kind, kind + 1]
            while len(words) < self.tokens:
                words.insert(draw.randint(0, len(words)), LETTER)
            rows.append([NUMBERS + pairs, *words])
        return torch.tensor(rows)


def trained(run: Run, texts: Tensor, mask: int, tokens: int | None, steps: int, seed: int) -> Any:
    """A new model of the words of `texts` and `mask`."""
    from seqmix.models.encoder import SeqmixForMaskedLM
    from seqmix.objectives.masked_diffusion import Config, MaskedDiffusion
    from seqmix.train.objective import train_objective

    vocabulary = max(mask, int(texts.max())) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SeqmixForMaskedLM.create(
            f"{run['depth']}x[bidirectional_attention]", width=run["width"], vocabulary=vocabulary
        )
    goal = MaskedDiffusion(Config(mask_id=mask, tokens=tokens))
    options = {"batch": run["batch"], "learning_rate": run["learning_rate"], "seed": seed}
    train_objective(model, texts, goal, steps=steps, **options)
    return model.eval()


def causality(order: Tensor) -> dict[str, list[float]]:
    """Both measures by text."""
    from seqmix.analyze.decoding_order import global_causality, local_causality

    return {
        f"{name}, {k}": measure(order, k).tolist()
        for name, measure in (("local", local_causality), ("global", global_causality))
        for k in SPANS
    }


def code_orders(run: Run) -> dict[str, Any]:
    """How a model of code continues new code, by temperature; and orders drawn at random."""
    from seqmix.data.text import read_text
    from seqmix.generate.diffusion import denoise

    content = "\n".join(read_text(run["corpus"]).documents).encode()[: run["bytes"]]
    length = run["prompt"] + run["new tokens"]
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    rows = rows[: len(rows) // length * length].view(-1, length)
    tests = rows[-run["continued"] :, : run["prompt"]]
    model = trained(run, rows[: -run["continued"]], BYTE_MASK, None, run["code_steps"], 0)
    found = {}
    for temperature in run["temperatures"]:
        filled = denoise(
            model, tests, mask_id=BYTE_MASK, length=run["new tokens"], temperature=temperature
        )
        found[str(temperature)] = causality(filled.order)
    drawn = torch.rand(filled.order.shape, generator=torch.Generator().manual_seed(0))
    return found | {"random order": causality(drawn.argsort(dim=1))}


def reinforced(run: Run, seed: int) -> dict[str, Any]:
    """A model of expressions before and after reinforcement with both kinds of masks."""
    from seqmix.generate.diffusion import denoise
    from seqmix.train import likelihood
    from seqmix.train.reinforce import Group, reinforce

    expressions = Expressions(run["expression"])
    texts = expressions.texts(run["expressions"], seed)
    base = trained(run, texts, MASK, expressions.tokens, run["expression_steps"], seed)
    options = {"mask_id": MASK, "length": expressions.tokens}

    def write(model: Any, prompts: Tensor, draw: int) -> Tensor:
        return denoise(model, prompts, temperature=1.0, seed=draw, **options).tokens

    def judged(model: Any) -> dict[str, float]:
        many = expressions.prompts.repeat(run["samples"], 1)
        drawn = denoise(model, many, temperature=1.0, **options)
        likeliest = denoise(model, expressions.prompts, **options)
        orders = causality(drawn.order)
        return {
            "passed, drawn": expressions.passed(many, drawn.tokens).mean().item(),
            "passed, likeliest": expressions.passed(expressions.prompts, likeliest.tokens)
            .mean()
            .item(),
        } | {name: statistics.fmean(values) for name, values in orders.items()}

    kinds = {
        "coupled": likelihood.complementary_masks,
        "uncoupled": likelihood.independent_masks,
    }
    found: dict[str, Any] = {"base": judged(base)}
    for name, masks in kinds.items():
        model = copy.deepcopy(base)
        estimate = likelihood.Masked(mask_id=MASK, masks=masks)
        history = reinforce(
            model,
            expressions.prompts,
            write,
            expressions.passed,
            estimate,
            steps=run["reinforcement_steps"],
            group=Group(**run["group"]),
            seed=seed,
        )
        found[name] = judged(model)
        found[f"{name}, rewards"] = history[:: max(1, len(history) // 6)]
    found["variance"] = variances(
        run, base, expressions.prompts, write(base, expressions.prompts, 1), kinds
    )
    return found


@torch.no_grad()
def variances(
    run: Run, model: Any, prompts: Tensor, answers: Tensor, kinds: dict[str, Any]
) -> dict[str, list[float]]:
    """By answer, the variance over masks of the estimated log-likelihood, and the mean of its tokens' variances."""
    from seqmix.train.likelihood import Masked

    found: dict[str, list[float]] = {}
    for name, masks in kinds.items():
        estimate, generator = Masked(mask_id=MASK, masks=masks), torch.Generator().manual_seed(0)
        values = torch.stack(
            [estimate(model, prompts, answers, generator) for _ in range(run["draws"])]
        )
        found[name] = values.sum(dim=2).var(dim=0).tolist()
        found[f"{name}, by token"] = values.var(dim=0).mean(dim=1).tolist()
        found[f"{name}, mean"] = [values.sum(dim=2).mean().item()]
    return found


def measure(run: Run) -> list[Finding]:
    orders = run.remember("orders", lambda: code_orders(run))
    found = [
        run.remember(f"reinforcement, seed {seed}", lambda s=seed: reinforced(run, s))
        for seed in range(run["seeds"])
    ]
    return [biased(orders), freed(run, orders), steadier(found), *better(found)]


def _together(verdicts: list[str]) -> Any:
    return verdicts[0] if len(set(verdicts)) == 1 else "inconclusive"


def biased(orders: dict[str, Any]) -> Finding:
    coldest = next(iter(orders))
    names = ("local, 1", "global, 1")
    return Finding(
        "A masked diffusion model of code writes largely from left to right, although nothing asks it to.",
        f"local and global causality with k = 1 at temperature {coldest}: above those of random orders, by two "
        "standard errors over texts",
        {
            name: {key: statistics.fmean(values) for key, values in orders[name].items()}
            for name in (coldest, "random order")
        },
        _together(
            [compare_groups(orders[coldest][name], orders["random order"][name]) for name in names]
        ),
    )


def freed(run: Run, orders: dict[str, Any]) -> Finding:
    low, *_, high = (str(temperature) for temperature in run["temperatures"])
    names = ("local, 1", "global, 1")
    return Finding(
        "The higher the temperature, the less its order is that from left to right.",
        f"local and global causality with k = 1: lower at temperature {high} than at {low}, by two standard errors "
        "over texts",
        {
            name: {key: statistics.fmean(values) for key, values in orders[name].items()}
            for name in orders
            if name != "random order"
        },
        _together([compare_groups(orders[low][name], orders[high][name]) for name in names]),
    )


def steadier(found: list[dict[str, Any]]) -> Finding:
    values = {
        name: [value for one in found for value in one["variance"][name]]
        for name in found[0]["variance"]
    }
    gains = [other - one for one, other in zip(values["coupled"], values["uncoupled"], strict=True)]
    return Finding(
        "Complementary masks lower the variance of the estimated log-likelihood at an equal number of model calls.",
        "variance over masks of an answer's log-likelihood: below that with independent masks, by two standard errors "
        "of the difference over answers",
        {name: statistics.fmean(each) for name, each in values.items()},
        compare_groups(gains, [0.0]),
    )


def better(found: list[dict[str, Any]]) -> list[Finding]:
    names = ("base", "coupled", "uncoupled")

    def of(key: str) -> dict[str, list[float]]:
        return {name: [one[name][key] for one in found] for name in names}

    drawn, spread = of("passed, drawn"), "by two standard errors over seeds"
    measured = drawn | {
        "likeliest expressions": of("passed, likeliest"),
        "rewards in training": {
            name: [one[f"{name}, rewards"] for one in found] for name in names[1:]
        },
    }
    order = of("global, 1")
    return [
        Finding(
            "Coupled-GRPO raises the share of expressions that pass.",
            f"expressions drawn at temperature 1: more pass than of the base model, {spread}",
            measured,
            compare_groups(drawn["coupled"], drawn["base"]),
        ),
        Finding(
            "It raises it more than the same with independent masks.",
            f"expressions drawn at temperature 1: more pass, {spread}",
            {name: drawn[name] for name in names[1:]},
            compare_groups(drawn["coupled"], drawn["uncoupled"]),
        ),
        Finding(
            "After it, expressions are written less from left to right than before.",
            f"global causality with k = 1 at temperature 1: below the base model's, {spread}",
            order | {"local": of("local, 1")},
            compare_groups(order["base"], order["coupled"]),
        ),
    ]


CLAIM = Claim(
    title="DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation",
    paper="arXiv:2506.20639",
    claimed="A masked diffusion model of code decides itself how far it writes from left to right, less at a higher "
    "temperature; reinforcement with complementary masks estimates likelihoods with a lower variance, raises the share "
    "of expressions that pass their tests, and makes the order less one from left to right. Here: models of 0.1 M "
    "parameters, of the bytes of Python code and of expressions with brackets; the paper's has 7 B.",
    where="sections 4.1 to 4.3 (orders and temperature; figures 5 and 6), section 5 (coupled-GRPO; figures 4 and 7, "
    "table 2), appendix A.4 (variance)",
    measure=measure,
    quick={
        "corpus": QUICK_TEXT,
        "bytes": 4000,
        "prompt": 8,
        "new tokens": 8,
        "continued": 4,
        "temperatures": [0.2, 1.2],
        "code_steps": 2,
        "width": 16,
        "depth": 1,
        "batch": 8,
        "learning_rate": 3e-3,
        "expression": 8,
        "expressions": 100,
        "expression_steps": 2,
        "reinforcement_steps": 2,
        "group": {"prompts": 2, "answers": 2},
        "samples": 1,
        "draws": 4,
        "seeds": 1,
    },
    full={
        "corpus": "python_code",
        "bytes": 1_000_000,
        "prompt": 16,
        "new tokens": 24,
        "continued": 64,
        "temperatures": [0.2, 0.6, 1.0, 1.4],
        "code_steps": 350,
        "width": 64,
        "depth": 2,
        "batch": 32,
        "learning_rate": 3e-3,
        "expression": 12,
        "expressions": 20000,
        "expression_steps": 250,
        "reinforcement_steps": 20,
        "group": {"prompts": 16, "answers": 16, "learning_rate": 1e-3},
        "samples": 20,
        "draws": 64,
        "seeds": 3,
    },
)
