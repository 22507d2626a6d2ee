"""The speeds to reach: every floor as data, measured as a ratio within one run, and what limits it.

The limit is a roofline: how much of our time the arithmetic would take at the speed of a matrix product, the
memory traffic at the speed of memory, and the exponentials at the speed of torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from seqmix.core.errors import SeqmixError
from seqmix.measure import peers
from seqmix.measure.calls import PASSES
from seqmix.measure.peers import Peer
from seqmix.measure.ratios import (
    BOTH,
    FORWARD,
    Row,
    Shape,
    against_peer,
    against_product,
    bfloat16_gain,
    put_in_place,
    sparse_product,
    whole_model,
)
from seqmix.measure.roofs import Settings, limits
from seqmix.ops import OPERATORS, Case

PRODUCT = "a 2048-cube torch matmul"
CHUNK = 64  # in the FLOPs that are counted


@dataclass(frozen=True, kw_only=True)
class Floor:
    """One row: what is measured against what, and the least ratio. `measure` gives one record per size."""

    what: str
    against: str
    at_least: float
    measure: Callable[[Settings], list[Row]]
    dtype: str = "float32"


def _linear(case: Case) -> tuple[float, float]:
    B, T, H, K, V = (case[letter] for letter in "BTHKV")
    exponentials = 2.0 * B * T * H * K if case.get("gate") == "vector" else 0.0
    return B * T * H * (2 * CHUNK * K + 2 * CHUNK * V + 4 * K * V), exponentials


def _delta(case: Case) -> tuple[float, float]:
    B, T, H, K, V = (case[letter] for letter in "BTHKV")
    return B * T * H * (4 * CHUNK * K + 3 * CHUNK * V + 6 * K * V), 0.0


def _scan(case: Case) -> tuple[float, float]:
    B, T, E, N = (case[letter] for letter in "BTEN")
    return 7.0 * B * T * E * N, float(B * T * E * N)


def _attention(case: Case) -> tuple[float, float]:
    cost = OPERATORS.get("attention").cost(case)
    return cost.flops, float(case["B"] * case["T"] * case["H"] * case["S"])


def heads(
    operator: str, work: Any, gate: str, lengths: Sequence[int], widths: Sequence[int]
) -> Any:
    """Eight heads of these widths over these lengths."""
    name = {"linear_attention": f"{gate}_decay"}.get(operator, f"{gate}_gate")
    sizes = {"B": 1, "H": 8}
    return [
        Shape(operator, Case(name, {**sizes, "T": T, "K": K, "V": K}, {"gate": gate}), work)
        for T in lengths
        for K in widths
    ]


LENGTHS, WIDTHS = (2048, 8192), (64, 128)
LINEAR = {
    gate: heads("linear_attention", _linear, gate, LENGTHS, WIDTHS) for gate in ("scalar", "vector")
}
DELTA = heads("delta_rule", _delta, "scalar", LENGTHS, WIDTHS)
SCAN = [
    Shape("selective_scan", Case("one_text", {"B": 1, "T": T, "E": 512, "N": 16}), _scan)
    for T in LENGTHS
]
CACHED = {"B": 1, "T": 1, "S": 131072, "K": 64, "V": 64}


def _rate(
    what: str, at_least: float, shapes: Sequence[Shape], passes: str, dtype: str = "float32"
) -> Floor:
    measure = partial(against_product, shapes, passes, dtype)
    return Floor(
        what=f"{what}, {passes}, FLOP rate",
        against=PRODUCT,
        at_least=at_least,
        measure=measure,
        dtype=dtype,
    )


def _faster(what: str, at_least: float, shapes: Sequence[Shape], peer: Peer, passes: str) -> Floor:
    return Floor(
        what=f"{what}, {passes}",
        against=peer.name,
        at_least=at_least,
        measure=partial(against_peer, shapes, peer, passes, "float32"),
    )


def _decode(query_heads: int, key_heads: int) -> list[Shape]:
    return [
        Shape("attention", Case("causal", {**CACHED, "H": query_heads, "G": key_heads}), _attention)
    ]


def _short() -> list[Shape]:
    lengths = (512, 1024, 2048, 8192)
    return heads("linear_attention", _linear, "scalar", lengths, (64,))


SOFTMAX = next(peer for peer in peers.PEERS if peer.operator == "linear_attention")
STEP = [
    Shape(
        "delta_rule",
        Case(
            "scalar_gate",
            {"B": 1, "T": 1, "H": 8, "K": 64, "V": 64},
            {"gate": "scalar", "qk_l2norm": True},  # as the models call it
        ),
        _delta,
    )
]
KINDS = (
    ("linear_attention, scalar decay", LINEAR["scalar"], 0.75, 0.45),
    ("linear_attention, vector decay", LINEAR["vector"], 0.45, 0.3),
    ("delta_rule, scalar gate", DELTA, 0.55, 0.35),
)
HYBRIDS = (  # 4 layers, width 256; tokens of a text, or decoded tokens
    ("Mamba, T = 512", "mamba", "training", 512, 25),
    ("Qwen3-Next-like, T = 2048", "qwen3_next", "training", 2048, 1.6),
    ("Qwen3-Next-like, T = 8192", "qwen3_next", "training", 8192, 2.5),
    ("Mamba", "mamba", "decoding", 64, 1.5),
    ("Qwen3-Next-like", "qwen3_next", "decoding", 64, 1.2),
)
GAINS = (*KINDS, ("selective_scan, E = 512, N = 16", SCAN, 0.0, 0.0))
FLOORS: tuple[Floor, ...] = (
    *(_rate(what, least, shapes, FORWARD) for what, shapes, least, _ in KINDS),
    *(_rate(what, least, shapes, BOTH) for what, shapes, _, least in KINDS),
    _faster("delta_rule, scalar gate, T = 8192", 12, DELTA[2:], peers.TRANSFORMERS_DELTA_RULE, BOTH),
    _faster("selective_scan, E = 512, N = 16", 40, SCAN, peers.TRANSFORMERS_SELECTIVE_SCAN, FORWARD),
    # the reference's backward is quadratic in T: one pass over 8192 tokens takes minutes
    _faster("selective_scan, E = 512, N = 16", 40, SCAN[:1], peers.TRANSFORMERS_SELECTIVE_SCAN, BOTH),
    Floor(
        what="one decode step of the gated delta rule, 8 heads of 64x64, as accelerate puts it in place",
        against=peers.TRANSFORMERS_DELTA_STEP.name,
        at_least=4,
        measure=partial(put_in_place, STEP, peers.TRANSFORMERS_DELTA_STEP),
    ),
    _faster("decode attention, 131072 cached tokens, 8 heads", 1.4, _decode(8, 8), peers.TORCH_ATTENTION, FORWARD),
    _faster(
        "decode attention, 131072 cached tokens, 9 query and 3 key heads",
        4, _decode(9, 3), peers.TORCH_ATTENTION, FORWARD,
    ),
    *(
        Floor(
            what="block-sparse matmul at 90% sparsity, BERT-base FFN, 512 tokens",
            against=f"torch, {against}",
            at_least=least,
            measure=partial(sparse_product, against=against),
        )
        for against, least in (("dense", 4), ("BSR", 3))
    ),
    *(
        Floor(
            what=f"{name}, whole model, {task}",
            against="transformers without acceleration",
            at_least=least,
            measure=partial(whole_model, family, task, length),
        )
        for name, family, task, length, least in HYBRIDS
    ),
    _faster("linear_attention, scalar decay, from T = 512", 1, _short(), SOFTMAX, FORWARD),
    *(
        Floor(
            what=f"{what}, {passes}, bfloat16 inputs",
            against="the same with float32 inputs",
            at_least=1,
            measure=partial(bfloat16_gain, shapes, passes),
            dtype="bfloat16",
        )
        for passes in PASSES
        for what, shapes, *_ in GAINS
    ),
)  # fmt: skip


def measure_floor(floor: Floor, settings: Settings) -> list[Row]:
    """The rows of a floor, one per size, or one that says why it cannot be measured here."""
    about = {
        "what": floor.what,
        "against": floor.against,
        "at_least": floor.at_least,
        "dtype": floor.dtype,
    }
    try:
        found = floor.measure(settings)
    except SeqmixError as error:
        return [about | {"skipped": str(error)}]
    return [about | row for row in found]


def summarise(rows: Sequence[Row], roofs: Mapping[str, Any]) -> list[Row]:
    """One row per floor: the worst size decides, and its limit is told."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["what"], row["against"]), []).append(row)
    summaries = []
    for (what, against), members in groups.items():
        first = members[0]
        summary = {name: first.get(name) for name in ("at_least", "dtype")}
        summary |= {"what": what, "against": against}
        if "skipped" in first:
            summaries.append(summary | {"skipped": first["skipped"]})
            continue
        worst = min(members, key=lambda row: row["ratio"])
        summary |= {
            "ratio": worst["ratio"],
            "best": max(row["ratio"] for row in members),
            "sizes": worst["sizes"],
            "limits": limits(worst, roofs),
            "reached": None
            if summary["at_least"] is None
            else worst["ratio"] >= summary["at_least"],
        }
        summaries.append(summary)
    return summaries
