"""What attention promises beyond the laws: bounded memory, decoding without copies, hard scores."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqmix.core.errors import NoUsableForm, RangeError, ShapeError
from seqmix.kernels import missing
from seqmix.ops import attention, record_forms

compiled = pytest.mark.skipif(missing() is not None, reason=str(missing()))


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


@compiled
def test_a_cache_in_bfloat16_is_not_widened():
    store = normal(2, 5000, 2, 16).bfloat16()
    k = v = store[:, :4097]
    q = normal(2, 1, 4, 16).bfloat16()
    with torch.no_grad(), LargestResult((store, q)) as largest:
        attention(q, k, v)
    assert largest.entries < k.numel() // 8


@compiled
@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("head_major", [False, True])
def test_pieces_of_the_keys_merge_wherever_they_are_cut(queries, width, head_major):
    q = normal(3, queries, 6, width)
    k, v = normal(3, 1700, 2, width), normal(3, 1700, 2, width)
    if head_major:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    exact = attention(q.double(), k.double(), v.double(), form="definition").float()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(attention(q, k, v, form="native"))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0], exact)
    assert all(torch.equal(results[0], other) for other in results[1:])


@compiled
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 40, "sinks": 3}])
def test_packed_texts_of_any_length_are_read_in_one_call(options):
    lengths = torch.tensor([1, 0, 63, 64, 65, 200, 0, 0, 130, 7, 0])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    q, k, v = (normal(1, int(bounds[-1]), heads, 16) for heads in (6, 2, 2))
    exact = [
        attention(*texts, **options, form="blocked")
        for texts in zip(
            *(x.split(lengths[lengths > 0].tolist(), 1) for x in (q, k, v)), strict=True
        )
    ]
    packed = attention(q, k, v, **options, cu_seqlens=bounds, form="native")
    torch.testing.assert_close(packed, torch.cat(exact, dim=1))


@compiled
def test_where_a_gradient_is_wanted_the_compiled_form_steps_back():
    q, k, v = (normal(1, 9, 2, 8) for _ in range(3))
    with record_forms() as ran:
        attention(q, k, v)
    assert ran == {("attention", "native")}
    q.requires_grad_()
    with record_forms() as ran:
        attention(q, k, v).sum().backward()
    assert ("attention", "native") not in ran
    with pytest.raises(NoUsableForm, match="no backward pass"):
        attention(q, k, v, form="native")


@compiled
def test_what_is_not_a_number_stays_so():
    q, k, v = (normal(1, 100, 2, 8) for _ in range(3))
    q[0, 50] = torch.nan
    o = attention(q, k, v, form="native")
    assert o[0, 50].isnan().all()
    assert o[0, :50].isfinite().all()
    assert o[0, 51:].isfinite().all()


@compiled
def test_the_compiled_operator_describes_itself():
    q, k, v = normal(1, 5, 4, 8), normal(1, 9, 2, 8), normal(1, 9, 2, 12)
    arguments = (q, k, v, None, None, None, True, -1, 0, 0.3)
    torch.library.opcheck(torch.ops.seqmix.attention.default, arguments)


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


@pytest.mark.parametrize(
    "options", [{}, {"window": 30, "sinks": 2}, {"window": 15, "causal": False}]
)
def test_as_many_best_keys_as_are_seen_are_all_of_them(options):
    q, k, v = (normal(2, 50, heads, 8) for heads in (4, 2, 2))
    got, wanted = attention(q, k, v, best=32, **options), attention(q, k, v, **options)
    torch.testing.assert_close(got[:, :32], wanted[:, :32])
    if options:
        torch.testing.assert_close(got, wanted)
    else:
        assert not torch.allclose(got[:, 40:], wanted[:, 40:], atol=1e-4)


def test_one_best_key_gives_its_value():
    q, k, v = (normal(2, 50, 2, 8) for _ in range(3))
    scores = torch.einsum("bthk,bshk->bhts", q, k).masked_fill(
        ~torch.ones(50, 50, dtype=torch.bool).tril(), -torch.inf
    )
    best = scores.argmax(-1).transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 8)
    torch.testing.assert_close(attention(q, k, v, best=1), v.gather(1, best))


def test_values_of_other_keys_are_not_read():
    q, k, v = (normal(1, 50, 2, 8) for _ in range(3))
    v.requires_grad_()
    attention(q[:, -1:], k, v, best=3).sum().backward()
    assert (v.grad[0].abs().sum(-1) > 0).sum(0).tolist() == [3, 3]


def test_choosing_the_best_keys_copies_none():
    store = normal(2, 5000, 2, 16)
    k = v = store[:, :4097]
    q = normal(2, 1, 4, 16)
    with torch.no_grad(), LargestResult((store, q)) as largest:
        attention(q, k, v, best=16)
    assert largest.entries < k.numel() // 2


def test_no_best_key_is_refused():
    q, k, v = (normal(1, 5, 2, 8) for _ in range(3))
    with pytest.raises(RangeError, match="best"):
        attention(q, k, v, best=0)
