"""DSFormer: weights as small bases times sparse codes, found by training on the task (Chand et al. 2023)."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._training import QUICK_TEXT, specify

FEWER = 0.6  # of the bytes of low-rank factors, at no higher loss: the abstract's "up to 40%"
STRAIGHT = "dense x sparse, straight through"
APART = "dense x sparse, weights alone"
APART_TRAINED = "dense x sparse, weights alone, then trained"
LOW_RANK = "truncated SVD"
LOW_RANK_TRAINED = "truncated SVD, then trained"
LARGER = "truncated SVD with more bytes, then trained"
METHODS = (STRAIGHT, APART, APART_TRAINED, LOW_RANK, LOW_RANK_TRAINED, LARGER)


def measure(run: Run) -> list[Finding]:
    results = [
        run.remember(f"seed {seed}", lambda s=seed: compared(run, s)) for seed in run["seeds"]
    ]
    return findings(results)


def compared(run: Run, seed: int) -> dict[str, Any]:
    """Held-out losses of one small model, and of what each method makes of it."""
    from seqmix.compress import Calibration
    from seqmix.data.text import read_text, split_text
    from seqmix.train import train

    spec, training = specify(run["layout"], run["training"])
    trained = train(spec, run["data"], seed=seed, progress=False, **training)
    assert trained.tokenizer is not None
    text, _ = split_text(read_text(run["data"]))  # the part that `train` trains on
    data = Calibration.of(
        text, trained.tokenizer, length=training["length"], windows=run["windows"]
    )
    model = trained.model
    found: dict[str, Any] = {"whole": {"loss": trained.evaluation["loss"], "bytes": size(model)}}
    for name in METHODS:
        found[name] = best_of_rates(run, name, model, trained.tokenizer, data)
    return found


def best_of_rates(run: Run, name: str, model: Any, tokenizer: Any, data: Any) -> dict[str, Any]:
    """Loss, bytes and weight error after a method, at whichever learning rate leaves the lowest loss."""
    from seqmix.data.text import read_text, split_text
    from seqmix.train import evaluate

    _, held_out = split_text(read_text(run["data"]))
    trains = "straight" in name or "trained" in name
    tried = []
    for rate in run["rates"] if trains else run["rates"][:1]:
        made = compressed(run, name, model, data, rate)
        loss = evaluate(
            made,
            held_out,
            tokenizer=tokenizer,
            length=run["training"]["length"],
            tokens=run["evaluation tokens"],
            progress=False,
        )["loss"]
        tried.append((loss, rate, made))
    loss, rate, made = min(tried, key=lambda one: one[0])
    found = {"loss": loss, "bytes": size(made), "weight error": weight_error(model, made)}
    return found | ({"rate": rate} if trains else {})


def compressed(run: Run, name: str, model: Any, data: Any, rate: float) -> Any:
    """The model after a method; factors that train do so for the same steps on the same windows."""
    from seqmix.compress import TRANSFORMS, Work
    from seqmix.compress.dense_sparse import learn
    from seqmix.linears import Replacement

    budget = {"steps": run["steps"], "batch": run["training"]["batch"], "learning_rate": rate}
    straight = budget if name == STRAIGHT else {"steps": 0}
    kind = TRANSFORMS.get("dense_sparse")
    made = kind(remove=run["remove"], height=run["height"], **straight).fit(model, data, Work())
    if name in (LOW_RANK, LOW_RANK_TRAINED, LARGER):
        made = truncated(model, made, 1 / FEWER if name == LARGER else 1.0)
    if "trained" in name:
        made.requires_grad_(False)
        for module in made.modules():
            if isinstance(module, Replacement):
                module.requires_grad_(True)
                if module.bias is not None:
                    module.bias.requires_grad_(False)
        learn(made, data.windows, **budget)
    return made.eval()


def truncated(model: Any, like: Any, times: float) -> Any:
    """Truncated SVDs of the layers that are replaced in `like`, each with no fewer than `times` its bytes."""
    from seqmix.compress.low_rank import factorised
    from seqmix.models.rebuild import replaced

    layers = {}
    for place in like.config.to_spec().replaced:
        layer, other = model.model.get_submodule(place), like.model.get_submodule(place)
        small = times * sum(
            t.numel() * t.element_size() for n, t in other.state_dict().items() if n != "bias"
        )
        rank = math.ceil(small / layer.weight.element_size() / sum(layer.weight.shape))
        layers[place] = factorised(layer, min(rank, *layer.weight.shape))
    return replaced(model, layers)


def size(model: Any) -> int:
    """Bytes of the tensors of the blocks."""
    tensors = model.model.backbone.state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def weight_error(model: Any, made: Any) -> float:
    """The mean relative error of the weights that were replaced."""
    errors = []
    for place in made.config.to_spec().replaced:
        weight = model.model.get_submodule(place).weight
        other = made.model.get_submodule(place).to_dense().weight
        errors.append(float((weight - other).norm() / weight.norm()))
    return statistics.fmean(errors)


def findings(results: list[dict[str, Any]]) -> list[Finding]:
    def of(name: str, what: str = "loss") -> list[float]:
        return [result[name][what] for result in results]

    errors = {name: of(name, "weight error") for name in (APART, LOW_RANK)}
    straight, apart, low_rank, larger = (
        of(name) for name in (STRAIGHT, APART_TRAINED, LOW_RANK_TRAINED, LARGER)
    )
    return [
        Finding(
            "Bases times sparse codes come nearer to the weights than low rank at the same bytes.",
            "a smaller mean relative error of the weights than truncated SVDs that have no fewer bytes, without "
            "training, by more than two standard errors over the seeds",
            errors,
            compare_groups(errors[LOW_RANK], errors[APART]),
        ),
        Finding(
            "Trained straight through, they lose less of the task than low-rank factors of the same bytes.",
            "a lower held-out loss than truncated SVDs that train for the same steps on the same text",
            {"seeds": results},
            compare_groups(low_rank, straight),
        ),
        Finding(
            "Factors that learn from the task which entries to keep lose less than factors of the weights alone.",
            "a lower held-out loss than dense x sparse factors of the weights alone, whose bases and values (not "
            "their places) train for the same steps afterwards",
            {"straight through": straight, "places fixed": apart},
            compare_groups(apart, straight),
        ),
        Finding(
            "They need 40% fewer bytes than low-rank factors for the same quality.",
            f"with at most {FEWER} of the bytes, a lower held-out loss than truncated SVDs trained for the same steps",
            {"dense x sparse": straight, "truncated SVD, more bytes": larger},
            compare_groups(larger, straight),
        ),
    ]


TRAINING = {"width": 128, "heads": 4, "length": 64, "batch": 8, "learning_rate": 3e-3}

CLAIM = Claim(
    title="DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization",
    paper="arXiv:2312.13211",
    claimed="small dense matrices times semi-structured sparse ones keep more than low-rank factors at the same size, "
    "the more so when all are learned from the task by a straight-through estimator; up to 40% smaller",
    where="abstract",
    measure=measure,
    quick={
        "layout": "attention",
        "data": QUICK_TEXT,
        "training": TRAINING | {"width": 32, "steps": 8, "evaluation_tokens": 512},
        "seeds": [0],
        "rates": [3e-3],
        "steps": 4,
        "windows": 16,
        "height": 8,
        "remove": 0.5,
        "evaluation tokens": 512,
    },
    full={
        "layout": "2x[attention]",
        "data": "shakespeare",
        "training": TRAINING | {"steps": 300, "evaluation_tokens": 16384},
        "seeds": [0, 1],
        "rates": [1e-3, 3e-3],
        "steps": 50,
        "windows": 512,
        "height": 16,
        "remove": 0.5,
        "evaluation tokens": 16384,
    },
)
