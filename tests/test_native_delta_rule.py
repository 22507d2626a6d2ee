"""The compiled delta rule: awkward sizes, shared key heads, threads, and the loop over a few tokens."""

import pytest
import torch
import torch.nn.functional as F

from seqmix.core.numerics import assert_as_accurate
from seqmix.kernels import missing
from seqmix.kernels.delta_rule import delta_rule as native
from seqmix.ops import delta_rule

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def sample(length, key_heads, heads, key, value, gate, steps=1, batch=2, texts=None):
    axes = {"none": None, "scalar": (heads,), "vector": (heads, key)}[gate]
    return {
        "q": torch.randn(batch, length, key_heads, key),
        "k": F.normalize(torch.randn(batch, length * steps, key_heads, key), dim=-1),
        "v": torch.randn(batch, length * steps, heads, value),
        "beta": torch.rand(batch, length * steps, heads),
        "g": None if axes is None else -2 * torch.rand(batch, length, *axes),
        "state": torch.randn(texts or batch, heads, key, value),
    }


def outcome(form, inputs, dtype=torch.float32, **options):
    """Results and gradients of all inputs, for random gradients of the results."""
    inputs = {n: x if x is None else x.detach().to(dtype) for n, x in inputs.items()}
    needs = [x.requires_grad_() for x in inputs.values() if x is not None]
    if form == "native":
        results = native(**inputs, **options)
    else:
        state = inputs.pop("state")
        results = delta_rule(
            **inputs, initial_state=state, output_final_state=True, form=form, **options
        )
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    return [*results, *torch.autograd.grad(results, needs, weights)]


SHAPES = [  # T, heads of keys, heads of values, K, V, gate, steps
    (70, 2, 6, 24, 40, "scalar", 1),
    (70, 2, 4, 17, 16, "vector", 1),
    (33, 1, 3, 7, 5, "vector", 2),
    (3, 2, 4, 9, 130, "vector", 2),
    (130, 1, 1, 80, 200, "none", 1),
    (9, 1, 2, 33, 17, "scalar", 70),
    (2, 1, 1, 520, 8, "scalar", 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_any_size_is_as_accurate_as_the_definition(shape, packed):
    *sizes, steps = shape
    length = sizes[0]
    batch, texts = (1, 3) if packed else (2, 2)
    inputs = sample(*sizes, steps, batch=batch, texts=texts)
    options = {"steps": steps, "scale": 0.3, "qk_l2norm": True}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 1, 1, length])
    exact = outcome("definition", inputs, torch.float64, **options)
    plain = outcome("definition", inputs, **options)
    got = outcome("native", inputs, **options)
    names = ["o", "last", *(name for name, x in inputs.items() if x is not None)]
    for name, one, *others in zip(names, got, exact, plain, strict=True):
        assert_as_accurate(one, *others, what=name)
    with torch.no_grad():
        alone = native(**inputs, **options)
    for name, one, *others in zip(names[:2], alone, exact[:2], plain[:2], strict=True):
        assert_as_accurate(one, *others, what=f"{name} without gradients")


@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (2, 4)])
def test_any_number_of_threads_gives_the_same(heads):
    inputs = sample(70, *heads, 24, 200, "scalar", batch=1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            with torch.no_grad():
                alone = native(**inputs)
            results.append([*outcome("native", inputs), *alone])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, same)


def test_both_dtypes_may_be_mixed():
    inputs = sample(20, 1, 2, 16, 16, "scalar")
    mixed = {**inputs, "v": inputs["v"].bfloat16()}
    o, last = native(**mixed)
    wanted, wanted_last = native(**{**mixed, "v": mixed["v"].float()})
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, wanted.bfloat16())
    assert torch.equal(last, wanted_last)


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_the_custom_operator_is_described_rightly(gate):
    inputs = sample(9, 1, 2, 5, 6, gate)
    needs = [None if x is None else x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(torch.ops.seqmix.delta_rule.default, (*needs, None, 1, 0.5, True, True))


@pytest.mark.parametrize("name", ["k", "v", "beta", "g", "state"])
@pytest.mark.parametrize("length", [3, 20])
def test_shapes_that_would_read_beyond_memory_are_refused(name, length):
    inputs = sample(length, 1, 2, 5, 6, "scalar")
    inputs[name] = inputs[name][:, :-1]
    with pytest.raises(ValueError, match=r"is \[|are \["):
        native(**inputs)
