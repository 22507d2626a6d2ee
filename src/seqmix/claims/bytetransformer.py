"""ByteTransformer: pads are left out of the whole model, attention included (Zhai et al. 2022)."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.claims._attention_by import attention_by
from seqmix.claims._claim import Claim, Finding, Run
from seqmix.claims._encoder import EncoderLayer, Texts, build
from seqmix.claims._timing import median_milliseconds
from seqmix.claims._training import QUICK_TEXT
from seqmix.core import extras
from seqmix.core.numerics import relative_error
from seqmix.mixers import MIXERS
from seqmix.models.backbone import LanguageModel, ModelSpec
from seqmix.ops.attention import attention

LARGEST_ERROR = 1e-4
OVER_FUSED = 1.2  # over PyTorch's fused attention with a mask
HEADLINE = 6.13  # the paper's, over PyTorch's plain attention
END_TO_END = 1.55  # the least of the paper's 55 to 138 %
LONGEST = 512  # tokens that BERT has positions for
SMALL = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SHARE_OF_GAIN = 0.5  # of what leaving out the pads could give at most


def measure(run: Run) -> list[Finding]:
    return [
        packed_equals_padded(run),
        *attention_gains(run),
        encoder_gains(run),
        *pretrained_encoder(run),
        every_mixer_gains(run),
    ]


def model_of(name: str, run: Run) -> LanguageModel:
    spec = ModelSpec(layout=name, vocabulary=258, **run["mixer model"])
    return cast("LanguageModel", build(lambda: LanguageModel(spec)))


def mixer_texts(run: Run) -> Texts:
    return Texts.drawn(*run["mixer texts"], share=0.5)


def causal_mixers() -> list[str]:
    return [name for name in MIXERS if MIXERS.get(name).causal]


@torch.inference_mode()
def differences(name: str, run: Run) -> dict[str, float]:
    """Logits of packed texts against those of a padded batch, at the tokens, in two ways of packing."""
    from seqmix.models.hf import SeqmixConfig, SeqmixForCausalLM

    texts = mixer_texts(run)
    ids = torch.randint(258, texts.there.shape, generator=torch.Generator().manual_seed(1))
    model = model_of(name, run)
    wanted = texts.pack(model(ids)[0])  # later pads cannot change a causal model's earlier outputs
    packed = model(texts.pack(ids.unsqueeze(-1)).squeeze(-1), cu_seqlens=texts.cu_seqlens)[0]
    whole = SeqmixForCausalLM(SeqmixConfig.from_spec(model.spec)).eval()
    whole.model.load_state_dict(model.state_dict())
    masked = whole(input_ids=ids, attention_mask=texts.there.long(), use_cache=False).logits
    return {
        "packed": relative_error(packed, wanted),
        "attention_mask": relative_error(texts.pack(masked), wanted),
    }


@torch.inference_mode()
def encoder_difference(run: Run) -> float:
    texts = mixer_texts(run)
    padded, packed, x = encoders(run, texts)
    return relative_error(texts.pack(packed(x)), texts.pack(padded(x)))


def packed_equals_padded(run: Run) -> Finding:
    found: dict[str, Any] = {
        name: run.remember(f"differences of {name}", lambda n=name: differences(n, run))
        for name in causal_mixers()
    }
    encoder = run.remember("difference of the encoder", lambda: encoder_difference(run))
    worst = max([encoder, *(error for errors in found.values() for error in errors.values())])
    return Finding(
        "Leaving out the pads changes nothing, with any mixer.",
        f"relative differences of at most {LARGEST_ERROR:g} in float32 from a padded batch, at the tokens: a model of "
        "every mixer, packed by hand and through attention_mask, and a bidirectional encoder with a mask",
        {"largest": worst, "encoder": encoder, "by mixer": found},
        "reproduced" if worst <= LARGEST_ERROR else "not reproduced",
    )


def plain_attention(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores, softmax and reads as operations of their own: [B, H, T, K]."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@torch.inference_mode()
def time_attention(run: Run, number: int, longest: int, share: float) -> dict[str, float]:
    texts = Texts.drawn(number, longest, share)
    generator = torch.Generator().manual_seed(1)
    shape = number, longest, run["heads"], run["head_width"]
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    packed = [texts.pack(x) for x in (q, k, v)]
    heads_first = tuple(x.transpose(1, 2) for x in (q, k, v))
    mask = texts.there[:, None, None]
    calls = {
        "packed": lambda: attention(*packed, causal=False, cu_seqlens=texts.cu_seqlens),
        "padded, fused": lambda: F.scaled_dot_product_attention(*heads_first, attn_mask=mask),
        "padded, plain": lambda: plain_attention(mask, *heads_first),
    }
    squares = (texts.lengths.double() / longest).square().mean().item()
    return {
        **median_milliseconds(calls, run["repeats"]),
        "share of tokens": texts.share,
        "share of scores": squares,
    }


def attention_gains(run: Run) -> list[Finding]:
    table = {
        f"{number} texts up to {longest}, mean {share:g}": run.remember(
            f"attention, {number} x {longest}, {share}",
            lambda n=number, t=longest, s=share: time_attention(run, n, t, s),
        )
        for number, longest in run["attention texts"]
        for share in run["attention shares"]
    }
    fused = {case: row["padded, fused"] / row["packed"] for case, row in table.items()}
    plain = {case: row["padded, plain"] / row["packed"] for case, row in table.items()}
    at_paper = f"mean {run['paper share']:g}"
    usual = [ratio for case, ratio in fused.items() if case.endswith(at_paper)]
    best = max(ratio for case, ratio in plain.items() if case.endswith(at_paper))
    threads = torch.get_num_threads()
    return [
        Finding(
            "Fused attention over packed texts beats PyTorch's fused attention over padded ones.",
            f"at least {OVER_FUSED:g} times as fast as scaled_dot_product_attention with a mask, in the geometric "
            f"mean over sizes, where texts fill {run['paper share']:g} of the padded length on average",
            {"times faster": fused, "milliseconds": table, "threads": threads},
            "reproduced" if statistics.geometric_mean(usual) >= OVER_FUSED else "not reproduced",
        ),
        Finding(
            "It beats PyTorch's plain attention over padded texts by a factor of 6.13 (the paper: on a GPU).",
            f"at least {HEADLINE:g} times as fast as separate products and softmax with a mask, at the best size, "
            f"where texts fill {run['paper share']:g} of the padded length on average",
            {"times faster": plain, "best": best, "threads": threads},
            "reproduced" if best >= HEADLINE else "not reproduced",
        ),
    ]


def encoders(
    run: Run, texts: Texts
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]:
    """The same encoder on padded rows and on packed texts, both [B, T, D] to [B, T, D], and an input."""
    width = run["heads"] * run["head_width"]
    layers: nn.ModuleList = build(
        lambda: nn.ModuleList(EncoderLayer(width, run["heads"]) for _ in range(run["depth"]))
    )
    mask = texts.there[:, None, None]

    def padded(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x, mask)
        return x

    def packed(x: Tensor) -> Tensor:
        x = texts.pack(x)
        for layer in layers:
            x = layer(x, cu_seqlens=texts.cu_seqlens)
        return texts.unpack(x)

    x = torch.randn(*texts.there.shape, width, generator=torch.Generator().manual_seed(1))
    return padded, packed, x


@torch.inference_mode()
def time_encoder(run: Run, number: int, longest: int, share: float) -> dict[str, float]:
    texts = Texts.drawn(number, longest, share)
    padded, packed, x = encoders(run, texts)
    calls = {"packed": lambda: packed(x), "padded": lambda: padded(x)}
    return {**median_milliseconds(calls, run["repeats"]), "share of tokens": texts.share}


def encoder_gains(run: Run) -> Finding:
    table = {
        f"{number} texts up to {longest}, mean {share:g}": run.remember(
            f"encoder, {number} x {longest}, {share}",
            lambda n=number, t=longest, s=share: time_encoder(run, n, t, s),
        )
        for number, longest in run["encoder texts"]
        for share in run["encoder shares"]
    }
    gains = {case: row["padded"] / row["packed"] for case, row in table.items()}
    usual = [gain for case, gain in gains.items() if case.endswith(f"mean {run['paper share']:g}")]
    mean = statistics.geometric_mean(usual)
    return Finding(
        "A whole encoder runs 55 to 138 % faster than with pads (the paper: than five other systems).",
        f"at least {END_TO_END:g} times as fast as the same layers on padded rows with PyTorch's fused attention, "
        f"packing and unpacking included, where texts fill {run['paper share']:g} of the padded length on average",
        {"times faster": gains, "at the paper's share": mean, "milliseconds": table},
        "reproduced" if mean >= END_TO_END else "not reproduced",
    )


class PretrainedEncoder:
    """An encoder in transformers and in this package's blocks, and paragraphs of a real text as ids, in its order."""

    def __init__(self, run: Run) -> None:
        from seqmix.convert.hub import to_seqmix
        from seqmix.data.text import read_text
        from seqmix.models.pretrained import load

        text = "\n\n".join(read_text(run["data"]).documents)
        paragraphs = re.split(r"\s*\n\s*\n\s*", text)[: run["paragraphs"]]
        if run["pretrained"] is None:  # a small random one of bytes
            transformers = extras.require("transformers", extra="train")
            self.theirs = build(lambda: transformers.BertModel(transformers.BertConfig(**SMALL)))
            ids = [list(paragraph.encode())[:LONGEST] for paragraph in paragraphs]
        else:
            self.theirs, tokenizer = load(run["pretrained"])
            assert tokenizer is not None
            ids = tokenizer(paragraphs, truncation=True, max_length=LONGEST).input_ids
        self.ours = to_seqmix(self.theirs)
        self.paragraphs = [torch.tensor(each) for each in ids]

    def batch(self, number: int, longest: int | None, share: float | None) -> list[Tensor]:
        """Paragraphs as they come; or the nearest to lengths that are drawn around a share of the longest."""
        if longest is None or share is None:
            return self.paragraphs[-number:]
        left, chosen = list(self.paragraphs), []
        for length in Texts.drawn(number, longest, share).lengths.tolist():
            distances = [abs(len(ids) - length) for ids in left]
            chosen.append(left.pop(distances.index(min(distances))))
        return chosen

    @torch.inference_mode()
    def read(self, paragraphs: list[Tensor], repeats: int) -> dict[str, Any]:
        """Differences of embeddings, means over tokens [B, D], and the times of all ways to them."""
        from seqmix.models.encoder import mean_of_tokens

        texts = Texts(torch.tensor([len(ids) for ids in paragraphs]))
        ids = nn.utils.rnn.pad_sequence(paragraphs, batch_first=True)
        mask = texts.there.long()
        there = texts.there[:, None, None]  # [B, 1, 1, T]
        bias = torch.zeros(there.shape).masked_fill(~there, -torch.inf)

        def fused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=there).transpose(1, 2)

        def padded(function: Callable[..., Tensor]) -> Tensor:
            with attention_by(function):
                return mean_of_tokens(self.ours.features(ids), mask)

        ways: dict[str, Callable[[], Tensor]] = {
            "packed": lambda: mean_of_tokens(self.ours(ids, mask).last_hidden_state, mask),
            "padded": lambda: padded(fused),
            "padded, our kernel": lambda: padded(partial(attention, bias=bias)),
            "transformers": lambda: mean_of_tokens(self.theirs(ids, mask).last_hidden_state, mask),
        }
        mine = ways["packed"]()
        return {
            "differences": {name: relative_error(way(), mine) for name, way in ways.items()},
            "milliseconds": median_milliseconds(ways, repeats),
            "share of tokens": texts.share,
            "longest": texts.longest,
        }


def pretrained_encoder(run: Run) -> list[Finding]:
    """A real encoder on real texts: chosen for their lengths, and as they come."""
    encoder = cache(lambda: PretrainedEncoder(run))  # only if something is left to measure
    batches = {
        f"{number} texts up to {longest}, mean {share:g}": (number, longest, share)
        for number, longest in run["encoder texts"]
        for share in run["pretrained shares"]
    } | {"texts as they come": (run["as they come"], None, None)}
    rows = {
        case: run.remember(
            f"pretrained encoder, {case}",
            lambda b=batch: encoder().read(encoder().batch(*b), run["repeats"]),
        )
        for case, batch in batches.items()
    }
    differences = {case: row["differences"] for case, row in rows.items()}
    worst = max(error for row in differences.values() for error in row.values())
    times = {case: row["milliseconds"] for case, row in rows.items()}
    gains = {case: {n: row[n] / row["packed"] for n in row} for case, row in times.items()}
    usual = [gain for case, gain in gains.items() if case.endswith(f"mean {run['paper share']:g}")]
    padded = ("padded", "transformers")
    means = {name: statistics.geometric_mean(gain[name] for gain in usual) for name in padded}
    return [
        Finding(
            "A pretrained encoder gives the same embeddings without pads.",
            f"means over tokens of {run['pretrained']} on paragraphs of a real text: relative differences of at most "
            f"{LARGEST_ERROR:g} in float32 from the same blocks on padded rows and from transformers",
            {"largest": worst, "differences": differences},
            "reproduced" if worst <= LARGEST_ERROR else "not reproduced",
        ),
        Finding(
            "A whole pretrained encoder reads texts of mixed lengths 55 to 138 % faster than with pads.",
            f"at least {END_TO_END:g} times as fast as the same blocks on padded rows with PyTorch's fused attention "
            "and a mask, and as transformers, packing and unpacking included, in the geometric mean over sizes where "
            f"texts fill {run['paper share']:g} of the padded length on average",
            {"at the paper's share": means, "times faster": gains, "measured": rows},
            "reproduced" if min(means.values()) >= END_TO_END else "not reproduced",
        ),
    ]


@torch.inference_mode()
def time_mixer(name: str, run: Run) -> dict[str, float]:
    texts = mixer_texts(run)
    ids = torch.randint(258, texts.there.shape, generator=torch.Generator().manual_seed(1))
    row = texts.pack(ids.unsqueeze(-1)).squeeze(-1)
    model = model_of(name, run)
    calls: Mapping[str, Callable[[], object]] = {
        "packed": lambda: model(row, cu_seqlens=texts.cu_seqlens),
        "padded": lambda: model(ids),
    }
    return {**median_milliseconds(calls, run["mixer repeats"]), "share of tokens": texts.share}


def every_mixer_gains(run: Run) -> Finding:
    table = {
        name: run.remember(f"milliseconds of {name}", lambda n=name: time_mixer(n, run))
        for name in causal_mixers()
    }
    gains = {name: row["padded"] / row["packed"] for name, row in table.items()}
    wanted = {
        name: 1 + SHARE_OF_GAIN * (1 / row["share of tokens"] - 1) for name, row in table.items()
    }
    short = sorted(name for name in gains if gains[name] < wanted[name])
    return Finding(
        "Models of every mixer gain, not only attention.",
        f"with lengths uniform up to the longest, every model's gain is at least {SHARE_OF_GAIN:g} of that by the "
        "tokens that are left out",
        {"times faster": gains, "too little": short, "milliseconds": table},
        "not reproduced" if short else "reproduced",
    )


CLAIM = Claim(
    title="ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs",
    paper="arXiv:2210.03052",
    claimed="Packing texts of different lengths without pads through every part of a Transformer, with attention "
    "fused over the packed texts, makes attention up to 6.13 times and the whole model 55 to 138 % faster than "
    "systems that pad, at the same outputs.",
    where="abstract; the authors' repository (texts fill 0.6 of the padded length on average, batches of 1 and 16)",
    measure=measure,
    quick={
        "mixer model": {"width": 32, "depth": 1, "heads": 2},
        "mixer texts": [3, 24],
        "mixer repeats": 1,
        "heads": 2,
        "head_width": 16,
        "depth": 1,
        "paper share": 0.6,
        "attention texts": [[4, 64]],
        "attention shares": [0.6],
        "encoder texts": [[4, 64]],
        "encoder shares": [0.6],
        "pretrained": None,
        "data": QUICK_TEXT,
        "paragraphs": 200,
        "pretrained shares": [0.6],
        "as they come": 4,
        "repeats": 1,
    },
    full={
        "mixer model": {"width": 256, "depth": 2, "heads": 4},
        "mixer texts": [16, 256],
        "mixer repeats": 7,
        "heads": 12,
        "head_width": 64,
        "depth": 4,
        "paper share": 0.6,
        "attention texts": [[16, 128], [16, 256], [16, 512], [4, 1024]],
        "attention shares": [0.4, 0.6, 1.0],
        "encoder texts": [[16, 128], [4, 512]],
        "encoder shares": [0.4, 0.5, 0.6, 0.7, 1.0],
        "pretrained": "minilm",
        "data": "shakespeare",
        "paragraphs": 8000,
        "pretrained shares": [0.3, 0.5, 0.6, 0.7],
        "as they come": 16,
        "repeats": 5,
    },
)
