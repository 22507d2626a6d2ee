"""Laws of token mixers: each takes a `Subject` and raises AssertionError where it does not hold.

`check_mixer(MIXER)` holds any mixer class to all of them, in its default configuration at small sizes and
in those that the class names in `examples`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.core.state import State, fork, leaves, num_bytes, num_rows, select_rows
from seqmix.core.tree import Tree
from seqmix.mixers import Mixer
from seqmix.ops import OPERATORS
from seqmix.testing import _subject
from seqmix.testing._subject import LENGTH, Law, Subject, assert_close, check, of_the_class

TEXTS = (1, 3, 17, 2, 8)  # lengths of packed texts
MORE = (4, 1, 0, 9, 2)  # how they go on; one of them does not
EXACT = 1e-9  # for float64
TREE = Tree([-1, -1, 0, 0, 1, 2, 2, 5, 3, 8])


def output_has_the_shape_of_the_input(subject: Subject) -> None:
    mixer = subject.build()
    for length in (1, LENGTH):
        x = subject.tokens(length, batch=3)
        y, state = mixer(x)
        assert y.shape == x.shape, f"{list(x.shape)} became {list(y.shape)}"
        assert y.dtype == x.dtype
        assert num_rows(state) in (0, 3), f"a batch of 3 gave a state of {num_rows(state)} rows"


def the_future_changes_nothing(subject: Subject) -> None:
    """Unless the mixer says that it is not causal: then it must look ahead."""
    mixer, x, other = subject.build(), subject.tokens(), subject.tokens(seed=2)
    for t in (1, 7, LENGTH - 1):
        y = mixer(torch.cat([x[:, :t], 10 * other[:, t:]], dim=1))[0][:, :t]
        if mixer.causal:
            assert_close(
                y, mixer(x)[0][:, :t], f"outputs before token {t} when the tokens after it change"
            )
        else:
            assert not torch.allclose(y, mixer(x)[0][:, :t]), (
                "it says that it looks ahead, and does not"
            )


def the_future_gets_no_gradient(subject: Subject) -> None:
    """In float64 and up to rounding: differences of running sums cancel, but not to the last bit."""
    mixer = subject.build(dtype=torch.float64)
    x = subject.tokens(dtype=torch.float64).requires_grad_()
    if mixer.causal:
        (gradient,) = torch.autograd.grad(mixer(x)[0][:, :9].square().sum(), x)
        past, future = float(gradient[:, :9].abs().max()), float(gradient[:, 9:].abs().max())
        assert future <= 1e-12 * past, (
            f"later tokens get a gradient of {future:.1e} (earlier ones {past:.1e})"
        )


def step_equals_forward(subject: Subject) -> None:
    mixer, x = subject.build(), subject.tokens()
    whole, state = mixer(x)
    stepped, outputs = mixer.initial_state(x.shape[0], x), []
    for t in range(x.shape[1]):
        y, stepped = mixer.step(x[:, t], stepped)
        outputs.append(y)
    assert_close(torch.stack(outputs, dim=1), whole, "steps")
    _assert_same_state(mixer, stepped, state, subject, "after steps")


def splitting_anywhere_changes_nothing(subject: Subject) -> None:
    mixer, x = subject.build(dtype=torch.float64), subject.tokens(dtype=torch.float64)
    whole, state = mixer(x)
    further = _what_follows(mixer, state, subject, num_rows(state))
    for cuts in [*((t,) for t in range(1, LENGTH)), (3, 4), (1, 20), (8, 16)]:
        y, after = _in_pieces(mixer, x, cuts)
        assert_close(y, whole, f"cut at {cuts}", EXACT)
        got = _what_follows(mixer, after, subject, num_rows(state))
        assert_close(got, further, f"what follows the state cut at {cuts}", EXACT)


def gradients_flow_through_the_state(subject: Subject) -> None:
    mixer, x = subject.build(dtype=torch.float64), subject.tokens(dtype=torch.float64)
    whole = _gradients(mixer, lambda x: [mixer(x)[0][:, 6:]], x)
    pieces = _gradients(mixer, lambda x: [_in_pieces(mixer, x, (6, 9))[0][:, 6:]], x)
    for name, gradient in whole.items():
        assert_close(pieces[name], gradient, f"gradient of {name} in pieces", EXACT)


def a_state_is_a_value(subject: Subject) -> None:
    """Going on from a state leaves it as it was; two futures from one state do not meet."""
    mixer, x, other = subject.build(), subject.tokens(), subject.tokens(seed=2)
    for no_gradients in (True, False):
        with torch.set_grad_enabled(not no_gradients):
            _, state = mixer(x[:, :9])
            _, state = mixer(x[:, 9:11], state)
            before = [leaf.detach().clone() for leaf in leaves(state)]
            y, one = mixer(x[:, 11:15], state)
            mixer(other[:, 11:19], state)
            further, _ = mixer(x[:, 15:], one)
            again, _ = mixer(x[:, 11:15], state)
            alone = mixer(x)[0][:, 15:]
        unchanged = all(map(torch.equal, before, leaves(state)))
        assert unchanged, "the given state was modified"
        assert again.equal(y), "the same state gave another result the second time"
        assert_close(further, alone, "one future after another was taken")


def reordered_states_equal_reordered_batches(subject: Subject) -> None:
    mixer, x = subject.build(), subject.tokens(batch=3)
    rows = [2, 0, 0]
    _, state = mixer(x[:, :9])
    y, _ = mixer(x[rows, 9:], select_rows(state, rows))
    assert_close(y, mixer(x)[0][rows, 9:], "reordered rows")
    y, _ = mixer(x[:, 9:].repeat_interleave(2, 0), fork(state, 2))
    assert_close(y, mixer(x)[0][:, 9:].repeat_interleave(2, 0), "forked rows")


def rows_are_independent(subject: Subject) -> None:
    mixer, x = subject.build(), subject.tokens(batch=3)
    whole, _ = mixer(x)
    for row in range(3):
        assert_close(mixer(x[row : row + 1])[0], whole[row : row + 1], f"row {row} alone")


def packed_texts_equal_separate_calls(subject: Subject) -> None:
    mixer = subject.build(dtype=torch.float64)
    texts = [subject.tokens(n, batch=1, seed=n, dtype=torch.float64) for n in TEXTS]
    separate = [mixer(text) for text in texts]
    y, state = mixer(torch.cat(texts, dim=1), cu_seqlens=_bounds(TEXTS))
    assert_close(y, torch.cat([y for y, _ in separate], dim=1), "packed texts", EXACT)
    for i, (_, alone) in enumerate(separate):
        _assert_same_state(
            mixer, select_rows(state, [i]), alone, subject, f"after packed text {i}", EXACT
        )


def packed_texts_give_the_same_gradients(subject: Subject) -> None:
    mixer, x = (
        subject.build(dtype=torch.float64),
        subject.tokens(sum(TEXTS), batch=1, dtype=torch.float64),
    )

    def separately(x: Tensor) -> list[Tensor]:
        return [mixer(text)[0] for text in x.split(TEXTS, dim=1)]

    separate = _gradients(mixer, separately, x)
    packed = _gradients(mixer, lambda x: [mixer(x, cu_seqlens=_bounds(TEXTS))[0]], x)
    for name, gradient in separate.items():
        assert_close(packed[name], gradient, f"gradient of {name} over packed texts", EXACT)


def nothing_leaks_between_packed_texts(subject: Subject) -> None:
    mixer, x = subject.build(), subject.tokens(sum(TEXTS), batch=1).requires_grad_()
    y, _ = mixer(x, cu_seqlens=_bounds(TEXTS))
    start, stop = _bounds(TEXTS)[2:4].tolist()
    (gradient,) = torch.autograd.grad(y[:, start:stop].square().sum(), x)
    assert gradient[:, start:stop].any()
    outside = torch.cat([gradient[:, :start], gradient[:, stop:]], dim=1)
    assert not outside.any(), "a packed text depends on its neighbours"


def texts_of_different_lengths_continue_together(subject: Subject) -> None:
    """From a packed state: packed again, then in step as a batch."""
    mixer = subject.build(dtype=torch.float64)
    total = [a + b + 6 for a, b in zip(TEXTS, MORE, strict=True)]
    texts = [subject.tokens(n, batch=1, seed=n, dtype=torch.float64) for n in total]
    wanted = [mixer(text)[0] for text in texts]
    pieces = [text.split((a, b, 6), dim=1) for text, a, b in zip(texts, TEXTS, MORE, strict=True)]
    goals = [y.split((a, b, 6), dim=1) for y, a, b in zip(wanted, TEXTS, MORE, strict=True)]
    first, second, third = zip(*pieces, strict=True)
    _, state = mixer(torch.cat(first, dim=1), cu_seqlens=_bounds(TEXTS))
    y, state = mixer(torch.cat(second, dim=1), state, cu_seqlens=_bounds(MORE))
    assert_close(y, torch.cat([goal[1] for goal in goals], dim=1), "packed texts continued", EXACT)
    head, state = mixer(torch.cat(third)[:, :2], state)
    tail, _ = mixer(torch.cat(third)[:, 2:], state)
    goal = torch.cat([goal[2] for goal in goals])
    assert_close(torch.cat([head, tail], dim=1), goal, "packed texts continued as a batch", EXACT)


def a_tree_is_read_as_its_paths(subject: Subject) -> None:
    """From the beginning of a text and further on: outputs of every node, and the state before the nodes."""
    mixer = subject.build(dtype=torch.float64)
    x = subject.tokens(9 + 3 + len(TREE), dtype=torch.float64)
    first, x = x.tensor_split([9], dim=1)
    for state in [mixer(first)[1]] if mixer.reads_prefix else [None, mixer(first)[1]]:
        y, after = mixer.read_tree(x, state, TREE)
        for leaf in sorted(
            {*range(len(TREE))} - {*TREE.parents}
        ):  # every node is on the way to one
            path = TREE.ancestors[leaf].nonzero().flatten()
            alone = torch.cat([x[:, :3], x[:, 3:][:, path]], dim=1)
            wanted = mixer(alone, state)[0]
            nodes = f"nodes {path.tolist()} of a tree"
            assert_close(y[:, 3:][:, path], wanted[:, 3:], nodes, EXACT)
        trunk, before = mixer(x[:, :3], state)
        assert_close(y[:, :3], trunk, "what the tree follows", EXACT)
        _assert_same_state(mixer, after, before, subject, "before the tree", EXACT)


def every_parameter_gets_a_gradient(subject: Subject) -> None:
    mixer, x = subject.build(), subject.tokens()
    _subject.assert_every_parameter_gets_a_gradient(mixer, lambda: mixer(x)[0])


@of_the_class
def every_field_has_an_effect(subject: Subject) -> None:
    for field in subject.kind.Config.fields():
        _subject.assert_field_has_an_effect(subject, field, lambda mixer: _output(subject, mixer))


def output_scale_is_moderate(subject: Subject) -> None:
    _subject.assert_moderate_scale(subject.build()(subject.tokens(64))[0])


def state_bytes_are_as_declared(subject: Subject) -> None:
    mixer = subject.build()
    _, state = mixer(subject.tokens(8))
    for length in (8, 9, 10):
        declared, real = mixer.state_bytes(length), num_bytes(state) // 2
        assert declared == real, (
            f"state_bytes({length}) is {declared}, the state takes {real} per text"
        )
        _, state = mixer(subject.tokens(1, seed=length), state)
    for length in (0, 1, LENGTH):
        x = subject.tokens(length)
        state = mixer(x)[1] if length else mixer.initial_state(2, x)
        declared, real = mixer.state_bytes(length), num_bytes(state) // 2
        assert declared == real, (
            f"state_bytes({length}) is {declared}, the state takes {real} per text"
        )


def a_state_keeps_nothing_else_in_memory(subject: Subject) -> None:
    """A view of what a text was computed with would keep all of it for as long as the state."""
    for bounds in (None, _bounds(TEXTS)):
        _, state = subject.build()(subject.tokens(sum(TEXTS), batch=1), cu_seqlens=bounds)
        kept = sum(leaf.untyped_storage().nbytes() for leaf in leaves(state))
        assert kept <= num_bytes(state), f"{num_bytes(state)} bytes of state keep {kept} in memory"


def cost_is_positive_and_grows(subject: Subject) -> None:
    mixer = subject.build()
    short, long, later = mixer.cost(64), mixer.cost(128), mixer.cost(64, context=64)
    assert 0 < short.flops < long.flops, "flops must grow with the length"
    assert 0 < short.bytes < long.bytes, "bytes must grow with the length"
    assert later.flops >= short.flops, "a context makes nothing cheaper"
    assert later.state_bytes == mixer.state_bytes(128)


def matrix_is_what_the_operator_does(subject: Subject) -> None:
    """M [B, H, T, T] applied to the value operand gives the operator's output (n columns per token with n steps)."""
    mixer, x = subject.build(dtype=torch.float64), subject.tokens(dtype=torch.float64)
    operator = OPERATORS.get(mixer.operator) if mixer.operator else None
    if operator is None or operator.value is None:
        try:
            mixer.matrix(x)
        except ConfigError:
            return
        raise AssertionError("a mixer without an operator that is linear in a value has no matrix")
    arguments, _ = mixer.operands(x)
    result = operator.function(**arguments)
    output = result[0] if isinstance(result, tuple) else result
    matrix, value = mixer.matrix(x), arguments[operator.value]
    if value.ndim == 3:  # [B, T, D]: every channel is a head
        value, output = value.unsqueeze(-1), output.unsqueeze(-1)
    batch, heads, rows, columns = matrix.shape
    assert (batch, heads, rows) == (x.shape[0], output.shape[2], x.shape[1]), (
        f"matrix {list(matrix.shape)}"
    )
    value = value.repeat_interleave(heads // value.shape[2], dim=2)
    applied = torch.einsum("bhts,bshv->bthv", matrix, value)
    assert_close(applied, output, "matrix times value", 1e-6)
    token = torch.arange(columns) // (columns // rows)
    future = token > torch.arange(rows).unsqueeze(-1)
    if mixer.causal:
        assert not (matrix.abs() * future > 1e-12).any(), "the matrix is not lower triangular"


def configuration_and_weights_round_trip(subject: Subject) -> None:
    _subject.assert_round_trip(subject, lambda mixer: _output(subject, mixer))


def builds_on_the_meta_device(subject: Subject) -> None:
    _subject.assert_builds_on_meta(subject, lambda mixer: _output(subject, mixer))


def a_deep_copy_is_independent(subject: Subject) -> None:
    _subject.assert_deep_copy_is_independent(subject, lambda mixer: _output(subject, mixer))


def bfloat16_stays_within_budget(subject: Subject) -> None:
    def output(mixer: nn.Module, dtype: torch.dtype) -> Tensor:
        return _in_pieces(mixer, subject.tokens().bfloat16().to(dtype), (9,))[0]

    _subject.assert_bfloat16_is_near(subject, output)


def mixed_precision_stays_within_budget(subject: Subject) -> None:
    x = subject.tokens()
    _subject.assert_mixed_precision_is_near(subject, lambda mixer: _in_pieces(mixer, x, (9,))[0])


def inference_states_can_be_continued(subject: Subject) -> None:
    mixer, x = subject.build(), subject.tokens()
    with torch.inference_mode():
        head, state = mixer(x[:, :9])
        middle, state = mixer(x[:, 9:11], state)
    with torch.no_grad():
        tail, _ = mixer(x[:, 11:], state)
    assert_close(
        torch.cat([head, middle, tail], dim=1), mixer(x)[0], "continued outside inference mode"
    )


def long_texts_stay_finite(subject: Subject) -> None:
    mixer, x = subject.build(), subject.tokens(300, batch=1).requires_grad_()
    y, state = mixer(x)
    y.square().sum().backward()
    for name, tensor in [
        ("output", y),
        ("gradient", x.grad),
        *(("state", s) for s in leaves(state)),
    ]:
        assert tensor.isfinite().all(), f"the {name} is not finite after 300 tokens"


def repeated_runs_are_equal(subject: Subject) -> None:
    assert _output(subject, subject.build()).equal(_output(subject, subject.build()))


def _output(subject: Subject, mixer: nn.Module) -> Tensor:
    return mixer(subject.tokens())[0]


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def _in_pieces(mixer: nn.Module, x: Tensor, cuts: Sequence[int]) -> tuple[Tensor, State]:
    outputs, state = [], None
    for piece in x.tensor_split(cuts, dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _gradients(
    mixer: nn.Module, compute: Callable[[Tensor], list[Tensor]], x: Tensor
) -> dict[str, Tensor]:
    """Of x and every parameter, under a fixed random cotangent of the outputs laid end to end."""
    x = x.detach().requires_grad_()
    y = torch.cat(compute(x), dim=1)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    named = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad((y * cotangent).sum(), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(named.items(), gradients, strict=True)
    }


def _assert_same_state(
    mixer: nn.Module,
    got: State,
    wanted: State,
    subject: Subject,
    what: str,
    tolerance: float = 1e-5,
) -> None:
    """States are equal if what follows them is: padding and spare room may differ."""
    rows = num_rows(wanted)
    assert_close(
        _what_follows(mixer, got, subject, rows),
        _what_follows(mixer, wanted, subject, rows),
        f"what follows the state {what}",
        tolerance,
    )


@torch.no_grad()
def _what_follows(mixer: nn.Module, state: State, subject: Subject, rows: int) -> Tensor:
    dtype = next(mixer.parameters()).dtype
    return mixer(subject.tokens(5, batch=max(1, rows), seed=4, dtype=dtype), state)[0]


MIXER_LAWS: tuple[Law, ...] = (
    output_has_the_shape_of_the_input,
    the_future_changes_nothing,
    the_future_gets_no_gradient,
    step_equals_forward,
    splitting_anywhere_changes_nothing,
    gradients_flow_through_the_state,
    a_state_is_a_value,
    reordered_states_equal_reordered_batches,
    rows_are_independent,
    packed_texts_equal_separate_calls,
    packed_texts_give_the_same_gradients,
    nothing_leaks_between_packed_texts,
    texts_of_different_lengths_continue_together,
    a_tree_is_read_as_its_paths,
    every_parameter_gets_a_gradient,
    every_field_has_an_effect,
    output_scale_is_moderate,
    state_bytes_are_as_declared,
    a_state_keeps_nothing_else_in_memory,
    cost_is_positive_and_grows,
    matrix_is_what_the_operator_does,
    configuration_and_weights_round_trip,
    builds_on_the_meta_device,
    a_deep_copy_is_independent,
    bfloat16_stays_within_budget,
    mixed_precision_stays_within_budget,
    inference_states_can_be_continued,
    long_texts_stay_finite,
    repeated_runs_are_equal,
)


def check_mixer(mixer_class: type[Mixer]) -> None:
    """Holds a mixer, in its default configuration and its `examples`, to every law.

    Raises AssertionError at the first law that it breaks without saying so in `exceptions`, and for an
    exception that it no longer needs.
    """
    check(mixer_class, MIXER_LAWS)
