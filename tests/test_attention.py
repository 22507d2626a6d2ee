"""What attention promises beyond the laws: bounded memory, decoding without copies, hard scores."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqmix.core.errors import RangeError, ShapeError
from seqmix.ops import attention


class LargestResult(TorchDispatchMode):
    """Remembers the number of entries of the largest new tensor."""

    def __init__(self, given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.given:
                self.entries = max(self.entries, x.untyped_storage().nbytes() // x.element_size())
        return result


def normal(*shape):
    return torch.randn(shape)


def test_a_window_never_builds_the_whole_matrix():
    length = 4096
    q, k, v = (normal(1, length, 2, 8).requires_grad_() for _ in range(3))
    with LargestResult((q, k, v)) as largest:
        attention(q, k, v, window=64).sum().backward()
    assert largest.entries <= 2 * q.numel()


@pytest.mark.parametrize("options", [{}, {"window": 4096}, {"sinks": torch.zeros(4)}])
def test_decoding_copies_no_keys(options):
    store = normal(2, 5000, 2, 16)
    k = v = store[:, :4097]
    q = normal(2, 1, 4, 16)
    with torch.no_grad(), LargestResult((store, q)) as largest:
        attention(q, k, v, **options)
    assert (
        largest.entries < k.numel() // 2
    )  # the scores of all heads, and nothing of the keys' size


@pytest.mark.parametrize("form", ["sdpa", "blocked"])
def test_scores_of_thousands_stay_finite(form):
    q, k, v = (normal(1, 300, 2, 8) for _ in range(3))
    q, k, v = (x.requires_grad_() for x in (q * 1e3, k, v))
    o = attention(q, k, v, form=form)
    torch.testing.assert_close(o, attention(q, k, v, form="definition"), atol=1e-3, rtol=1e-3)
    o.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_learned_sinks_are_one_more_key_that_holds_nothing():
    q, k, v = (normal(2, 5, 3, 8) for _ in range(3))
    sinks = normal(3)
    bias = torch.zeros(1, 3, 5, 6)
    bias[..., 0] = sinks[:, None]
    bias[..., 1:] = torch.full((5, 5), -torch.inf).triu(1)
    k0, v0 = (torch.cat([torch.zeros_like(x[:, :1]), x], dim=1) for x in (k, v))
    torch.testing.assert_close(
        attention(q, k, v, sinks=sinks), attention(q, k0, v0, bias=bias, causal=False)
    )


def test_a_window_of_one_reads_only_itself():
    q, k, v = (normal(1, 300, 2, 8) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, window=1), v)
    torch.testing.assert_close(attention(q, k, v, window=1, causal=False), v)


@pytest.mark.parametrize("form", [None, "blocked"])
def test_a_window_hides_keys_from_queries_that_outnumber_them(form):
    q, k, v = normal(1, 6, 2, 8), normal(1, 2, 2, 8), normal(1, 2, 2, 8)
    options = {"causal": False, "window": 3}
    exact = attention(q, k, v, **options, form="definition")
    torch.testing.assert_close(attention(q, k, v, **options, form=form), exact)
    assert not exact[:, 0].any()  # query 0 stands four places before key 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, RangeError, "`window` is 0"),
        ({"sinks": -1}, RangeError, "`sinks` is -1"),
        ({"bias": torch.zeros(2, 3, 4, 5)}, ShapeError, "`bias` has shape"),
        ({"sinks": torch.zeros(5)}, ShapeError, "`sinks` has shape"),
        (
            {"k": torch.zeros(1, 6, 3, 8), "v": torch.zeros(1, 6, 3, 8)},
            ShapeError,
            "divisor of the 4",
        ),
        (
            {"k": torch.zeros(1, 5, 4, 8), "v": torch.zeros(1, 5, 4, 8)},
            ShapeError,
            "wanted at least 6",
        ),
        (
            {
                "k": torch.zeros(1, 7, 4, 8),
                "v": torch.zeros(1, 7, 4, 8),
                "cu_seqlens": torch.tensor([0, 2, 6]),
            },
            ShapeError,
            "as many as queries",
        ),
    ],
)
def test_impossible_arguments_are_refused(options, error, message):
    q = torch.zeros(1, 6, 4, 8)
    with pytest.raises(error, match=message):
        attention(**{"q": q, "k": q, "v": q, **options})
