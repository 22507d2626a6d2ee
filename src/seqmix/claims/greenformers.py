"""Greenformers: low-rank weights for short texts, Linformer's short keys for long ones (Cahyawijaya 2021)."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._timing import median_milliseconds
from seqmix.claims._training import QUICK_TEXT

SHORT = 512  # tokens, where the thesis draws the line
SAVED = 0.7  # of the costs are left: "more than 30%" saved
LOSS = 1.05  # times the loss of the whole model after as many steps: the thesis calls it comparable
EMBEDDED = 30522 + 512 + 2  # rows of BERT-base's tables


class Layer(nn.Module):
    """A layer of BERT's shape, whose scores are written out as in 2021, or fused into one operator.

    With `kept`, keys and values [T, ...] are first projected along the text to so many rows by E [kept, longest],
    one for all heads (Wang et al. 2020, Linformer, arXiv:2006.04768, equation 7, keys and values sharing E); of E,
    shorter texts use the first T columns.
    """

    def __init__(self, width: int, heads: int, kept: int | None = None, longest: int = 0) -> None:
        super().__init__()
        self.heads, self.fused = heads, False
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.shorten = None
        if kept is not None:
            self.shorten = nn.Parameter(torch.randn(kept, longest) * longest**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.shorten is not None:
            short = self.shorten[:, : x.shape[1]]
            k, v = short @ k, short @ v
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        if self.fused:
            o = F.scaled_dot_product_attention(q, k, v)
        else:
            o = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = self.first_norm(x + self.output(o.transpose(1, 2).flatten(2)))
        y: Tensor = self.second_norm(x + self.contract(F.gelu(self.expand(x))))
        return y


def measure(run: Run) -> list[Finding]:
    layers = models(run)
    lengths = {
        str(length): run.remember(f"{length} tokens", partial(compared, run, layers, length))
        for length in run["lengths"]
    }
    size = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    quality = run.remember("quality", lambda: losses(run))
    return findings(run, lengths, size, quality)


def models(run: Run) -> dict[str, Layer]:
    """One layer as it is, every weight of it factorised, and with short keys."""
    from seqmix.compress.low_rank import factorised, rank_for
    from seqmix.linears import replace_layer

    width, heads, longest = run["width"], run["heads"], max(run["lengths"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = Layer(width, heads)
        short = Layer(width, heads, kept=run["kept"], longest=longest)
    low_rank = copy.deepcopy(whole)
    for name, layer in list(low_rank.named_children()):
        if isinstance(layer, nn.Linear):
            replace_layer(low_rank, name, factorised(layer, rank_for(layer, run["remove"])))
    return {"whole": whole, "low rank": low_rank, "Linformer": short}


def compared(run: Run, layers: dict[str, Layer], length: int) -> dict[str, dict[str, float]]:
    """Milliseconds to read one text, and megabytes that a training step keeps, of each layer."""
    x = torch.randn(1, length, run["width"], generator=torch.Generator().manual_seed(0))
    found: dict[str, dict[str, float]] = {}
    for fused in (False, True):
        for layer in layers.values():
            layer.fused = fused
        with torch.no_grad():
            calls = {name: partial(layer, x) for name, layer in layers.items()}
            times = median_milliseconds(calls, run["rounds"])
        suffix = ", fused" if fused else ""
        found[f"milliseconds{suffix}"] = times
        found[f"megabytes{suffix}"] = {name: kept(layer, x) for name, layer in layers.items()}
    return found


def kept(layer: nn.Module, x: Tensor) -> float:
    """Megabytes of the weights, and of what a forward pass keeps for the backward one."""
    seen: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    for parameter in layer.parameters():
        see(parameter)
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        result = layer(x)  # alive until all is counted, so that no address is used twice
    del result
    return sum(seen.values()) / 1e6


def losses(run: Run) -> dict[str, float]:
    """Masked-language-model losses of a small encoder, whole and factorised, after as many steps."""
    from seqmix.claims._passages import VOCABULARY, loss_of_last_byte, pretrained, read_passages
    from seqmix.compress import TRANSFORMS, Calibration, Work
    from seqmix.convert.causality import redirect
    from seqmix.models.hf import create

    given = run["encoder"]
    passages = read_passages(given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = create(
            given["layout"], width=given["width"], vocabulary=VOCABULARY, mask_token_id=258
        )
    model = pretrained(redirect(fresh, "both"), "masked", passages, given, 0, steps=given["steps"])
    data = Calibration(windows=passages.train[:64])
    low_rank = TRANSFORMS.get("low_rank")(remove=run["remove"], whiten=False, tokens=2048)
    cheaper = low_rank.fit(model, data, Work())
    found = {
        "parameters": model.num_parameters(),
        "parameters, low rank": cheaper.num_parameters(),
        "at once": loss_of_last_byte(model, passages),
        "at once, low rank": loss_of_last_byte(cheaper, passages),
    }
    for name, made in (("trained on", model), ("trained on, low rank", cheaper)):
        pretrained(made, "masked", passages, given, 1, steps=given["more steps"])
        found[name] = loss_of_last_byte(made, passages)
    return found


def findings(
    run: Run,
    lengths: dict[str, dict[str, dict[str, float]]],
    size: dict[str, int],
    quality: dict[str, float],
) -> list[Finding]:
    def wins(winner: str, loser: str, chosen: dict[str, Any]) -> bool:
        return all(
            rows[what][winner] < rows[what][loser]
            for rows in chosen.values()
            for what in ("milliseconds", "megabytes")
        )

    short = {length: rows for length, rows in lengths.items() if int(length) <= SHORT}
    long = {length: rows for length, rows in lengths.items() if int(length) > SHORT}
    tables = EMBEDDED * run["width"]
    stored = {name: tables + 12 * count for name, count in size.items()}
    shares = {name: count / stored["whole"] for name, count in stored.items()}
    first = next(iter(lengths.values()))["milliseconds"]
    cost = {"parameters": shares["low rank"], "time": first["low rank"] / first["whole"]}
    ratio = quality["trained on, low rank"] / quality["trained on"]
    one_layer = (
        f"in one layer of BERT-base's shape, its scores written out, {run['kept']} keys kept"
    )
    rows = [
        (
            f"Up to {SHORT} tokens, low-rank weights take less time and memory than Linformer.",
            f"fewer milliseconds, and fewer megabytes kept by a training step, {one_layer}",
            short,
            wins("low rank", "Linformer", short),
        ),
        (
            f"Above {SHORT} tokens, Linformer takes less time and memory.",
            f"fewer milliseconds and megabytes {one_layer}",
            long,
            wins("Linformer", "low rank", long),
        ),
        (
            "Low-rank weights save more than 30% of BERT-base's costs.",
            f"at most {SAVED} of the parameters, the tables' included, and of the time at {run['lengths'][0]} tokens",
            {"share of the whole": cost},
            max(cost.values()) <= SAVED,
        ),
        (
            "Low-rank weights make the model smaller to store, which Linformer does not.",
            f"at most {SAVED} of BERT-base's parameters, and Linformer no fewer than BERT-base",
            {"share of BERT-base's parameters": shares},
            shares["low rank"] <= SAVED and shares["Linformer"] >= 1,
        ),
        (
            "An automatically factorised encoder keeps its quality.",
            f"a loss of at most {LOSS} times that of the whole encoder, both trained on for as many steps",
            {"losses": quality, "ratio": ratio},
            ratio <= LOSS,
        ),
    ]
    return [
        Finding(statement, expected, measured, "reproduced" if holds else "not reproduced")
        for statement, expected, measured, holds in rows
    ]


ENCODER = {
    "data": "shakespeare",
    "works": 4,
    "length": 64,
    "layout": "2x[attention]",
    "width": 128,
    "share": 0.15,
    "batch": 32,
    "learning_rate": 2e-3,
    "steps": 400,
    "more steps": 100,
}

CLAIM = Claim(
    title="Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation",
    paper="arXiv:2108.10808",
    claimed="low-rank weights save time and memory on texts of up to 512 tokens, Linformer on longer ones; only the "
    "first makes the model small to store; BERT-base needs over 30% less of everything",
    where="abstract",
    measure=measure,
    quick={
        "width": 32,
        "heads": 2,
        "kept": 8,
        "remove": 0.5,
        "lengths": [16, 600],
        "rounds": 1,
        "encoder": ENCODER
        | {"data": QUICK_TEXT, "layout": "attention", "width": 32, "steps": 2, "more steps": 1},
    },
    full={
        "width": 768,
        "heads": 12,
        "kept": 128,
        "remove": 0.5,
        "lengths": [128, 256, 512, 1024, 2048],
        "rounds": 5,
        "encoder": ENCODER,
    },
)
