"""How a speed becomes a ratio: ours and what it is compared with take turns, and both are checked before."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.core.errors import MissingExtra, SeqmixError
from seqmix.core.numerics import relative_error
from seqmix.measure.bench import matmul, milliseconds
from seqmix.measure.calls import (
    DTYPES,
    PASSES,
    TOLERANCES,
    Call,
    Inputs,
    call,
    disagreement,
    draw,
    exactly,
    num_bytes,
)
from seqmix.measure.peers import Peer
from seqmix.measure.roofs import Settings
from seqmix.measure.timing import Timing, time_in_turn
from seqmix.ops import OPERATORS, Case

FORWARD, BOTH = PASSES
# Outputs by inputs. The first are those of Shen et al. 2023; torch's BSR product takes only squares.
SPARSE_BLOCKS = {"dense": ((4, 1), (16, 16)), "BSR": ((16, 16),)}
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What one call computes: for the FLOP rate and for the roofline."""

    flops: float
    bytes: float
    exponentials: float = 0.0


@dataclass(frozen=True)
class Shape:
    """An operator's case under a floor."""

    operator: str
    case: Case
    work: Callable[[Case], tuple[float, float]]  # FLOPs and exponentials of the forward pass

    def sizes(self) -> dict[str, int]:
        return dict(self.case.sizes)

    def shrunk(self, settings: Settings) -> Shape:
        sizes = dict(self.case.sizes)
        for axis in ("T", "S"):
            if axis in sizes:
                sizes[axis] = max(1, sizes[axis] // settings.shrink)
        return Shape(self.operator, self.case.at(None, **sizes), self.work)


def _prepare(shape: Shape, dtype: str, *, state: bool = False) -> tuple[Call, Inputs]:
    """Our call on the shape, after a check against float64; raises `SeqmixError` where it is wrong."""
    operator = OPERATORS.get(shape.operator)
    inputs = draw(operator, shape.case, DTYPES[dtype])
    if not state:
        inputs.pop("initial_state", None)
    made = call(operator, inputs)
    if reason := disagreement(made, exactly(operator, inputs), DTYPES[dtype], gradients=False):
        raise SeqmixError(f"{shape.operator} is wrong here: {reason}")
    return made, inputs


def _work(shape: Shape, passes: str, made: Call, inputs: Inputs) -> Work:
    """Counted three times for forward and backward; the backward pass needs its exponentials once more."""
    flops, exponentials = shape.work(shape.case)
    backward = passes == BOTH
    return Work(
        flops=flops * (3 if backward else 1),
        bytes=float(num_bytes(inputs, made.run()) * (3 if backward else 1)),
        exponentials=exponentials * (2 if backward else 1),
    )


def against_product(
    shapes: Sequence[Shape], passes: str, dtype: str, settings: Settings
) -> list[Row]:
    """The FLOP rate over that of a float32 matrix product."""
    rows = []
    for shape in (s.shrunk(settings) for s in shapes):
        made, inputs = _prepare(shape, dtype)
        work = _work(shape, passes, made, inputs)
        calls = {"ours": made.timed(passes), "product": matmul(size=settings.matmul_size)}
        timings = time_in_turn(calls, seconds=settings.seconds, warmup=2)
        rate = work.flops / timings["ours"].median
        peak = 2 * settings.matmul_size**3 / timings["product"].median
        rows.append(_row(shape.sizes(), rate / peak, timings, work, gflops=rate / 1e9))
    return rows


def against_peer(
    shapes: Sequence[Shape],
    peer: Peer,
    passes: str,
    dtype: str,
    settings: Settings,
) -> list[Row]:
    """The time of another package's function over ours."""
    if reason := peer.missing():
        raise MissingExtra(reason)
    rows = []
    for shape in (s.shrunk(settings) for s in shapes):
        made, inputs = _prepare(shape, dtype)
        calls = {"ours": made.timed(passes), "theirs": peer.call(inputs).timed(passes)}
        timings = time_in_turn(calls, seconds=settings.seconds, warmup=1)
        ratio = timings["theirs"].median / timings["ours"].median
        rows.append(_row(shape.sizes(), ratio, timings, _work(shape, passes, made, inputs)))
    return rows


def put_in_place(shapes: Sequence[Shape], peer: Peer, settings: Settings) -> list[Row]:
    """The time of a function of transformers over that of what `accelerate` puts in its place."""
    if reason := peer.missing():
        raise MissingExtra(reason)
    accelerate = importlib.import_module("seqmix.convert.accelerate").accelerate
    rows = []
    for shape in shapes:
        made, inputs = _prepare(shape, "float32", state=True)
        theirs = peer.call(inputs)
        with accelerate():
            ours = peer.call(inputs)
        if reason := disagreement(ours, theirs, torch.float32, gradients=False):
            raise SeqmixError(f"{peer.function} accelerated is wrong here: {reason}")
        calls = {"ours": ours.forward, "theirs": theirs.forward}
        with torch.inference_mode():
            timings = time_in_turn(calls, seconds=settings.seconds, warmup=1)
        ratio = timings["theirs"].median / timings["ours"].median
        rows.append(_row(shape.sizes(), ratio, timings, _work(shape, FORWARD, made, inputs)))
    return rows


def bfloat16_gain(shapes: Sequence[Shape], passes: str, settings: Settings) -> list[Row]:
    """Our time with float32 inputs over that with bfloat16 inputs."""
    rows = []
    for shape in (s.shrunk(settings) for s in shapes):
        narrow, inputs = _prepare(shape, "bfloat16")
        wide, _ = _prepare(shape, "float32")
        calls = {"ours": narrow.timed(passes), "float32": wide.timed(passes)}
        timings = time_in_turn(calls, seconds=settings.seconds, warmup=2)
        ratio = timings["float32"].median / timings["ours"].median
        rows.append(_row(shape.sizes(), ratio, timings, _work(shape, passes, narrow, inputs)))
    return rows


def sparse_product(settings: Settings, *, against: str) -> list[Row]:
    """Both layers of a BERT-base feed-forward part, nine tenths of their blocks zero, for 512 tokens."""
    if "sparse_matmul" not in OPERATORS.names():
        raise SeqmixError("the operator sparse_matmul is not in this version")
    function = OPERATORS.get("sparse_matmul").function
    generator = torch.Generator().manual_seed(0)
    tokens = max(16, 512 // settings.shrink)
    rows = []
    for inner, outer in ((768, 3072), (3072, 768)):
        for height, width in SPARSE_BLOCKS[against]:
            kept = torch.rand(outer // height, inner // width, generator=generator) < 0.1
            weight = torch.randn(outer, inner, generator=generator)
            weight *= kept.repeat_interleave(height, 0).repeat_interleave(width, 1)
            x = torch.randn(1, tokens, inner, generator=generator)
            sparse = bsr(weight, height, width)
            parts = (sparse.values(), sparse.col_indices(), sparse.crow_indices())

            def ours(x: Tensor = x, parts: Any = parts) -> Tensor:
                with torch.inference_mode():
                    return function(x, *parts)

            dense = {"dense": weight, "BSR": sparse}[against]
            calls: dict[str, Callable[[], object]] = {"ours": ours}
            calls["theirs"] = partial(F.linear, x[0], dense)
            error = relative_error(ours()[0], x[0] @ weight.T)
            if not error < TOLERANCES[torch.float32]:
                raise SeqmixError(f"sparse_matmul is wrong here: off by {error:.1e} of its size")
            timings = time_in_turn(calls, seconds=settings.seconds, warmup=2)
            ratio = timings["theirs"].median / timings["ours"].median
            stored = sparse.values().numel()
            work = Work(2.0 * tokens * stored, 4.0 * (x.numel() + stored + tokens * outer))
            sizes = {"tokens": tokens, "in": inner, "out": outer, "height": height, "width": width}
            rows.append(_row(sizes, ratio, timings, work))
    return rows


def bsr(weight: Tensor, height: int, width: int) -> Tensor:
    """The same matrix with only its non-zero blocks stored."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse BSR tensor support is in beta", UserWarning)
        return weight.to_sparse_bsr((height, width))


def whole_model(family: str, task: str, length: int, settings: Settings) -> list[Row]:
    """A small model of transformers with `seqmix.accelerate` against the same without.

    Its FLOPs are those of its weights alone: 6 per weight and token in training, 2 in decoding, where every
    token also reads all weights.
    """
    if importlib.util.find_spec("seqmix.measure.hybrids") is None:
        raise SeqmixError("seqmix.measure.hybrids, which measures it, is not in this version")
    hybrids = importlib.import_module("seqmix.measure.hybrids")
    length = max(1, length // settings.shrink)
    found = hybrids.measure_hybrids(family, task, length=length)
    weights = sum(weight.numel() for weight in hybrids.build(family).parameters())
    training = task == "training"
    work = Work(
        flops=(6.0 if training else 2.0) * weights * length,
        bytes=4.0 * weights * (3 if training else length),
    )
    timings = {
        name: Timing(length / rate.median, length / rate.high, length / rate.low, rate.repeats)
        for name, rate in (("ours", found.accelerated), ("theirs", found.plain))
    }
    speed = {"tokens_per_second": found.accelerated.median}
    return [_row({"T": length}, found.ratio, timings, work, **speed)]


def _row(
    sizes: Mapping[str, int], ratio: float, timings: Mapping[str, Any], work: Work, **more: float
) -> Row:
    times = {name: milliseconds(timing) for name, timing in timings.items()}
    about = {"flops": work.flops, "bytes": work.bytes, "exponentials": work.exponentials}
    return {"sizes": dict(sizes), "ratio": ratio, "times": times, "work": about, **more}
