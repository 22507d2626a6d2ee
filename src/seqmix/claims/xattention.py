"""XAttention: attention over the blocks that antidiagonal sums point at (Xu et al. 2025)."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims.lean_attention import milliseconds
from seqmix.convert.block_sparse import block_sparse_prompts
from seqmix.core import extras
from seqmix.data.text import read_text
from seqmix.models.pretrained import load
from seqmix.ops.attention import attention
from seqmix.ops.block_sparse_attention import (
    antidiagonal_mass,
    block_sparse_attention,
    choose_blocks,
    lower_shares,
)

LEAST_MASS = 0.9  # of the attention, on average, where the estimate is asked for this share
LEAST_OF_ORACLE = 0.95
REAL_SPEED_UP, LONGEST_SPEED_UP = 1.5, 5.0
LARGEST_LOSS_RATIO = 1.01
NO_MORE_BLOCKS = 1.02


def measure(run: Run) -> list[Finding]:
    watched = Watched(run)
    return [
        mass_is_kept(run, watched),
        shares_per_head(run, watched),
        real_prompts_are_faster(run, watched),
        faster(run),
        loss_stays(run),
    ]


# ---- a pretrained model and its queries and keys on real text


def model_and_ids(run: Run) -> tuple[Any, Tensor]:
    """The model, and tokens of the text in its order; a small random model of random tokens where none is named."""
    if run["model"] is None:
        transformers = extras.require("transformers", extra="train")
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 64,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
        }
        heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
        return model, torch.randint(64, (run["texts"] * run["length"] + 1,))
    model, tokenizer = load(run["model"])
    assert tokenizer is not None
    text = "\n".join(read_text(run["data"]).documents)
    wanted = run["texts"] * run["length"] + 1
    ids = tokenizer(text[: 8 * wanted], return_tensors="pt").input_ids[0]
    return model, ids[:wanted]


class Watched:
    """Queries and keys of some layers in prompts that are computed in full; each text is read once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.texts: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def __call__(self, text: int) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer: q [1, T, H, K] and k [1, T, G, K]."""
        if text not in self.texts:
            run, seen = self.run, {}

            def keep(layer: int, q: Tensor, k: Tensor, blocks: Tensor) -> None:
                if layer in run["layers"]:
                    seen[layer] = (q.clone(), k.clone())

            model, ids = model_and_ids(run)
            start = text * run["length"]
            given = ids[None, start : start + run["watched length"]]
            sizes = {"block": run["block"], "stride": run["stride"]}
            with block_sparse_prompts(model, share=1.0, watch=keep, **sizes):
                model.base_model(given)
            self.texts[text] = seen
        return self.texts[text]


def exact_mass(q: Tensor, k: Tensor, block: int) -> Tensor:
    """The attention that each block of queries gives to each block of keys, [1, H, M, N], rows summing to 1."""
    length, heads = q.shape[1:3]
    keys = k.repeat_interleave(heads // k.shape[2], dim=2).permute(0, 2, 3, 1)
    blocks = -(-length // block)
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        scores = q[:, start:stop].transpose(1, 2) @ keys[..., :stop] * q.shape[-1] ** -0.5
        late = torch.arange(stop) > torch.arange(start, stop)[:, None]
        weights = scores.masked_fill(late, -torch.inf).softmax(-1)
        weights = F.pad(weights, (0, blocks * block - stop))
        parts.append(weights.unflatten(-1, (blocks, block)).sum(-1).mean(2))
    return torch.stack(parts, dim=2)


def pooled_mass(q: Tensor, k: Tensor, block: int) -> Tensor:
    """The control: blocks judged by the product of their mean query and mean key."""
    length, heads = q.shape[1:3]
    missing_tokens = -length % block
    means = [
        F.pad(x, (0, 0, 0, 0, 0, missing_tokens)).unflatten(1, (-1, block)).mean(2) for x in (q, k)
    ]
    keys = means[1].repeat_interleave(heads // k.shape[2], dim=2)
    scores = torch.einsum("bmhk,bnhk->bhmn", means[0], keys) * q.shape[-1] ** -0.5
    late = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(late, -torch.inf).softmax(-1)


def density(blocks: Tensor) -> float:
    return float(blocks.sum() / torch.ones_like(blocks).tril().sum())


def best_with(mass: Tensor, like: Tensor) -> Tensor:
    """As many blocks in every row as `like` has: those of the largest `mass`."""
    rank = mass.argsort(dim=-1, descending=True).argsort(dim=-1)
    return rank < like.sum(-1, keepdim=True)


def held(exact: Tensor, blocks: Tensor) -> float:
    return float((exact * blocks).sum(-1).mean())


# ---- the statements


def mass_is_kept(run: Run, watched: Watched) -> Finding:
    block, share = run["block"], LEAST_MASS

    def of_layers() -> dict[str, dict[str, float]]:
        table = {}
        for layer, (q, k) in watched(0).items():
            exact = exact_mass(q, k, block)
            blocks = choose_blocks(
                antidiagonal_mass(q, k, block=block, stride=run["stride"]), share
            )
            pooled = best_with(pooled_mass(q, k, block), blocks)
            table[str(layer)] = {
                "blocks computed": density(blocks),
                "kept": held(exact, blocks),
                "kept by the best blocks": held(exact, best_with(exact, blocks)),
                "kept by means of blocks": held(exact, pooled),
            }
        return table

    table = run.remember("attention kept", of_layers)
    mean = {
        name: statistics.fmean(row[name] for row in table.values())
        for name in next(iter(table.values()))
    }
    fine = (
        mean["kept"] >= LEAST_MASS
        and mean["kept"] >= LEAST_OF_ORACLE * mean["kept by the best blocks"]
        and mean["kept"] > mean["kept by means of blocks"]
    )
    return Finding(
        "Antidiagonal sums find the blocks that hold the attention.",
        f"blocks chosen for a share of {share} hold at least {LEAST_MASS} of the exact attention on average over "
        f"layers, heads and rows, at least {LEAST_OF_ORACLE} of what as many blocks can hold, and more than as many "
        "blocks chosen by mean queries and keys",
        {"mean": mean, "by layer": table, "tokens": run["watched length"]},
        "reproduced" if fine else "not reproduced",
    )


def shares_per_head(run: Run, watched: Watched) -> Finding:
    """Shares are lowered on one text and tried on another."""
    block, most = run["block"], run["lowerings"]
    levels = [0.95 * 0.9**a for a in range(most + 1)]

    def tried() -> dict[str, dict[str, float]]:
        first, second = watched(0), watched(1)
        table = {}
        for layer, (q, k) in first.items():
            exact, mass = (
                exact_mass(q, k, block),
                antidiagonal_mass(q, k, block=block, stride=run["stride"]),
            )
            quality = torch.stack(
                [(exact * choose_blocks(mass, level)).sum(-1).mean((0, 2)) for level in levels],
                dim=1,
            )
            heads = quality.shape[0]
            lowered = lower_shares(quality, heads * (most // 2))
            shares = torch.tensor(levels)[lowered]
            q, k = second[layer]
            exact, mass = (
                exact_mass(q, k, block),
                antidiagonal_mass(q, k, block=block, stride=run["stride"]),
            )
            same, own = choose_blocks(mass, levels[most // 2]), choose_blocks(mass, shares)
            table[str(layer)] = {
                "kept, one share": held(exact, same),
                "kept, a share per head": held(exact, own),
                "blocks, one share": density(same),
                "blocks, a share per head": density(own),
            }
        return table

    table = run.remember("shares per head", tried)
    mean = {
        name: statistics.fmean(row[name] for row in table.values())
        for name in next(iter(table.values()))
    }
    better = mean["kept, a share per head"] > mean["kept, one share"]
    cheap = mean["blocks, a share per head"] <= NO_MORE_BLOCKS * mean["blocks, one share"]
    return Finding(
        "Shares chosen per head by dynamic programming are better than one share for all.",
        "on a text that they were not chosen on, after as many lowerings in all: more of the exact attention is "
        f"kept, with at most {NO_MORE_BLOCKS} times the blocks",
        {"mean": mean, "by layer": table},
        "reproduced" if better and cheap else "not reproduced",
    )


def timed(run: Run, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Milliseconds of the choice, of the chosen blocks, and of full attention, here and in torch."""
    sizes = {"block": run["block"], "stride": run["stride"]}
    chosen = choose_blocks(antidiagonal_mass(q, k, **sizes), LEAST_MASS)
    taken = milliseconds(
        {
            "choice": lambda: choose_blocks(antidiagonal_mass(q, k, **sizes), LEAST_MASS),
            "blocks": lambda: block_sparse_attention(q, k, v, chosen, block=run["block"]),
            "full": lambda: attention(q, k, v),
            "torch": lambda: attention(q, k, v, form="sdpa"),
        },
        run["seconds"],
        run["repeats"],
    )
    whole = taken["choice"] + taken["blocks"]
    return {
        **taken,
        "speed-up": min(taken["full"], taken["torch"]) / whole,
        "speed-up over torch": taken["torch"] / whole,
        "blocks computed": density(chosen),
    }


def real_prompts_are_faster(run: Run, watched: Watched) -> Finding:
    @torch.no_grad()
    def times() -> dict[str, Any]:
        return {str(layer): timed(run, q, k, k.clone()) for layer, (q, k) in watched(0).items()}

    table = run.remember("times on real text", times)
    gain = sum(min(row["full"], row["torch"]) for row in table.values()) / sum(
        row["choice"] + row["blocks"] for row in table.values()
    )
    return Finding(
        "On real text within the model's context, attention is faster, the choice of blocks included.",
        f"all watched layers together, {run['watched length']} tokens: at least {REAL_SPEED_UP} times as fast as the "
        "faster of our full attention and torch's",
        {"speed-up": gain, "milliseconds by layer": table},
        "reproduced" if gain >= REAL_SPEED_UP else "not reproduced",
    )


def local_text(length: int, heads: int, width: int) -> list[Tensor]:
    """Queries that mostly match the keys of their neighbourhood, and the first keys, as those of long texts do.

    Keys follow a direction that drifts with time constant 256; queries are that direction, sharpened, and the
    first four keys match every query.
    """
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    knots = normal(heads, width, length // 256 + 2)
    drift = F.interpolate(knots, size=length, mode="linear").permute(2, 0, 1).unsqueeze(0)
    common = normal(width)
    q = 2.0 * drift + common + 0.5 * normal(1, length, heads, width)
    k = 1.5 * drift + 0.5 * normal(1, length, heads, width)
    k[:, :4] = 1.5 * common
    return [q, k, normal(1, length, heads, width)]


def faster(run: Run) -> Finding:
    @torch.no_grad()
    def times(length: int) -> dict[str, float]:
        return timed(run, *local_text(length, run["heads"], 64))

    table = {
        str(length): run.remember(f"times at length {length}", lambda n=length: times(n))
        for length in run["lengths"]
    }
    gains = [row["speed-up"] for row in table.values()]
    fine = gains[-1] >= LONGEST_SPEED_UP and gains == sorted(gains)
    return Finding(
        "The speed-up grows with the length (the paper: to 13.5 at 256k tokens on a GPU).",
        f"made-up queries and keys with local structure: faster at every longer length, and at least "
        f"{LONGEST_SPEED_UP} times as fast as full attention at the longest, {max(run['lengths'])}",
        {
            "speed-up by length": dict(zip(table, gains, strict=True)),
            "milliseconds by length": table,
        },
        "reproduced" if fine else "not reproduced",
    )


def loss_stays(run: Run) -> Finding:
    @torch.no_grad()
    def losses() -> dict[str, Any]:
        model, ids = model_and_ids(run)
        length = run["length"]

        def loss(text: int) -> float:
            given = ids[None, text * length : (text + 1) * length]
            wanted = ids[text * length + 1 : (text + 1) * length + 1]
            hidden = model.base_model(given).last_hidden_state[0]
            total = 0.0
            for part, labels in zip(hidden.split(512), wanted.split(512), strict=True):
                total += float(F.cross_entropy(model.lm_head(part), labels, reduction="sum"))
            return total / length

        full: list[float] = []
        sparse: dict[str, list[float]] = {str(share): [] for share in run["shares"]}
        computed = dict.fromkeys(sparse, 0.0)
        for text in range(run["texts"]):
            full.append(loss(text))
            for share in run["shares"]:
                options = {"block": run["block"], "stride": run["stride"]}
                with block_sparse_prompts(model, share=share, **options) as sparsity:
                    sparse[str(share)].append(loss(text))
                computed[str(share)] += sparsity.density / run["texts"]
        return {"full": full, "sparse": sparse, "blocks computed": computed}

    found = run.remember("losses", losses)
    mean = statistics.fmean(found["full"])
    ratios = {share: statistics.fmean(row) / mean for share, row in found["sparse"].items()}
    main = str(LEAST_MASS)
    fine = ratios[main] <= LARGEST_LOSS_RATIO and found["blocks computed"][main] < 1
    return Finding(
        "A pretrained model keeps its quality on long text.",
        f"loss over prompts of {run['length']} tokens with a share of {main} at most {LARGEST_LOSS_RATIO} times that "
        "of full attention, with fewer blocks computed",
        {"loss relative to full attention": ratios, "nats per token": found, "model": run["model"]},
        "reproduced" if fine else "not reproduced",
    )


CLAIM = Claim(
    title="XAttention: Block Sparse Attention with Antidiagonal Scoring",
    paper="arXiv:2503.16428",
    claimed="Sums along antidiagonals of the scores show which blocks of the attention matrix matter; computing only "
    "those keeps the quality of pretrained models on long texts and makes attention up to 13.5 times faster.",
    where="abstract; the speed-up over length, and the results on long-context benchmarks",
    measure=measure,
    quick={
        "model": None,
        "data": None,
        "texts": 2,
        "length": 160,
        "watched length": 160,
        "layers": [0, 1],
        "block": 16,
        "stride": 4,
        "shares": [0.5, LEAST_MASS],
        "lowerings": 4,
        "lengths": [256, 512],
        "heads": 2,
        "seconds": 0.05,
        "repeats": 2,
    },
    full={
        "model": "smollm2-135m",
        "data": "shakespeare",
        "texts": 2,
        "length": 8192,
        "watched length": 4096,
        "layers": [2, 10, 18, 26],
        "block": 128,
        "stride": 16,
        "shares": [0.8, LEAST_MASS],
        "lowerings": 8,
        "lengths": [4096, 8192, 16384, 32768],
        "heads": 1,
        "seconds": 5.0,
        "repeats": 5,
    },
)
