"""An operator that someone else wrote, in a file of their own, is held to the same laws."""

from dataclasses import replace

import pytest
import torch

from seqmix.core.cost import Cost
from seqmix.core.numerics import widen
from seqmix.ops._arguments import check_tensors
from seqmix.ops._operator import Case, Form, Operator
from seqmix.testing import check_operator

AXES = {"x": "B T E", "initial_state": "R E"}


def running_sum(x, *, initial_state=None, output_final_state=False, form=None):
    """h_t = h_{t-1} + x_t."""
    sizes = check_tensors("running_sum", AXES, {"x": x})
    bound = {"R": sizes["B"], "E": sizes["E"]}
    check_tensors("running_sum", AXES, {"initial_state": initial_state}, **bound)
    dtype = x.dtype
    x, h = widen(x, initial_state)
    h = x.new_zeros(sizes["B"], sizes["E"]) if h is None else h
    o, h = OPERATOR.run(form, x, h)
    return o.to(dtype), h if output_final_state else None


def definition(x, h):
    outputs = []
    for t in range(x.shape[1]):
        h = h + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, dim=1), h


def parallel(x, h):
    o = x.cumsum(1) + h[:, None]
    return o, o[:, -1]


def sample(case, generator):
    return {
        "x": torch.randn(case["B"], case["T"], case["E"], generator=generator),
        "initial_state": torch.randn(case["B"], case["E"], generator=generator),
    }


def cost(case):
    entries = case["B"] * case["T"] * case["E"]
    return Cost(flops=entries, bytes=8 * entries, state_bytes=4 * case["B"] * case["E"])


SIZES = {"B": 2, "T": 11, "E": 3}
OPERATOR = Operator(
    function=running_sum,
    equation="h_t = h_{t-1} + x_t",
    source="none",
    axes=AXES,
    definition=definition,
    forms={"parallel": Form(parallel)},
    sample=sample,
    cases=[Case("plain", SIZES)],
    timing=[Case("plain", {**SIZES, "T": 2048})],
    cost=cost,
    value="x",
    chunk=16,
)


def test_a_right_operator_passes():
    check_operator(OPERATOR)


def test_a_wrong_operator_is_told_which_law_it_breaks():
    wrong = replace(OPERATOR, forms={"parallel": Form(lambda x, h: (parallel(x, h)[0], h))})
    with pytest.raises(
        AssertionError, match="agrees_with_definition-running_sum-parallel-plain: final_state"
    ):
        check_operator(wrong)
