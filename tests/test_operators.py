"""Every operator keeps every law, and every law notices the operator that breaks it."""

import functools
from dataclasses import replace

import pytest
import torch

from seqmix.core.errors import NoUsableForm
from seqmix.ops import OPERATORS, Form, linear_attention, record_forms
from seqmix.testing import OPERATOR_LAWS, check_operator, poisoned_memory
from seqmix.testing.operators import Inapplicable, checks, installed

LINEAR = OPERATORS.get("linear_attention")
chunked = LINEAR.forms["chunked"].run


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


def every_check():
    for name in OPERATORS:
        operator = OPERATORS.get(name)
        for law, form, case in checks(operator):
            yield pytest.param(
                operator, law, form, case, id=f"{law.name}-{name}-{form}-{case.name}"
            )


@pytest.mark.parametrize(("operator", "law", "form", "case"), [*every_check()])
def test_law(operator, law, form, case):
    try:
        law(operator, form, case)
    except Inapplicable as reason:
        pytest.skip(str(reason))


# ---- broken operators, each with the laws that must notice


def with_chunked(run):
    return replace(LINEAR, forms={"recurrent": LINEAR.forms["recurrent"], "chunked": Form(run)})


def with_function(wrap):
    @functools.wraps(linear_attention)
    def function(*args, **options):
        return wrap(*args, **options)

    return replace(LINEAR, function=function)


def decay_off_by_one(q, k, v, g, state):
    return chunked(q, k, v, g if g is None else g.roll(1, dims=1), state)


def initial_state_forgotten(q, k, v, g, state):
    return chunked(q, k, v, g, torch.zeros_like(state))


def final_state_not_decayed(q, k, v, g, state):
    return chunked(q, k, v, g, state)[0], chunked(q, k, v, None, state)[1]


def scale_applied_twice(q, k, v, g, state):
    return chunked(q * q.shape[-1] ** -0.5, k, v, g, state)


def mask_off_by_one(q, k, v, g, state):
    o, state = chunked(q, k, v, g, state)
    seen = (q[:, :-1] * k[:, 1:]).sum(-1, keepdim=True) * v[:, 1:]
    return o + torch.cat([seen, torch.zeros_like(seen[:, :1])], dim=1), state


def heads_swapped(q, k, v, g, state):
    o, state = chunked(q, k, v, g, state)
    return o.flip(2), state


def gradient_of_keys_lost_in_the_state(q, k, v, g, state):
    return chunked(q, k, v, g, state)[0], chunked(q, k.detach(), v, g, state)[1]


def gradient_of_initial_state_lost(q, k, v, g, state):
    return chunked(q, k, v, g, state.detach())


def argument_written_to(q, k, v, g, state):
    with torch.no_grad():
        v.copy_(v.clone())
    return chunked(q, k, v, g, state)


def last_chunk_dropped(q, k, v, g, state):
    o, state = chunked(q, k, v, g, state)
    whole = o.shape[1] // LINEAR.chunk * LINEAR.chunk
    if 0 < whole < o.shape[1]:
        o = torch.cat([o[:, :whole], torch.zeros_like(o[:, whole:])], dim=1)
    return o, state


def accumulated_in_bfloat16(q, k, v, g, state):
    o, state = chunked(q, k, v, g, state)
    return o.bfloat16().to(o.dtype), state


def row_never_written(q, k, v, g, state):
    computed, state = chunked(q, k, v, g, state)
    o = torch.empty_like(computed)
    o[:, :-1] = computed[:, :-1]
    return o, state


def overflowing(q, k, v, g, state):
    if g is None or g.ndim == 4:
        return chunked(q, k, v, g, state)
    total = g.cumsum(1).unsqueeze(-1)
    reads, writes = q * total.exp(), k * (-total).exp()
    scores = torch.einsum("bihk,bjhk->bhij", reads, writes).tril()
    o = torch.einsum("bhij,bjhv->bihv", scores, v) + torch.einsum("bihk,bhkv->bihv", reads, state)
    return o, chunked(q, k, v, g, state)[1]


def rows_mixed(q, k, v, g, state):
    o, state = chunked(q, k, v, g, state)
    return o + 1e-3 * o.mean(0, keepdim=True), state


def storage_order_assumed(q, k, v, g, state):
    strides = torch.zeros(v.shape).stride()
    room = v.untyped_storage().nbytes() // v.element_size() - v.storage_offset()
    if room >= v.numel():
        v = v.as_strided(v.shape, strides)
    return chunked(q, k, v, g, state)


def different_every_time(q, k, v, g, state):
    o, state = chunked(q, k, v, g, state)
    return o * (1 + 4 * torch.finfo(o.dtype).eps * torch.rand_like(o)), state


def not_linear(q, k, v, g, state):
    return chunked(q, k, v * v.abs(), g, state)


def forgetful_step(q, k, v, g, state):
    return LINEAR.definition(q, k, v, g, state * 0.99 if q.shape[1] == 1 else state)


@with_function
def boundaries_ignored(*args, cu_seqlens=None, **options):
    if cu_seqlens is None:
        return linear_attention(*args, **options)
    texts = len(cu_seqlens) - 1
    o, state = linear_attention(*args, **options | {"initial_state": options["initial_state"][:1]})
    return o, state.expand(texts, -1, -1, -1)


@with_function
def state_in_bfloat16(*args, initial_state=None, **options):
    o, state = linear_attention(*args, initial_state=initial_state, **options)
    if options["v"].dtype == torch.bfloat16 and state is not None:
        state = state.bfloat16().float()
    return o, state


@with_function
def output_in_float32(*args, **options):
    o, state = linear_attention(*args, **options)
    return o.to(torch.promote_types(o.dtype, torch.float32)), state


@with_function
def anything_accepted(*args, **options):
    return linear_attention(
        *args,
        **{
            n: x.float() if isinstance(x, torch.Tensor) and not x.is_floating_point() else x
            for n, x in options.items()
        },
    )


@with_function
def silent_fallback(*args, form=None, **options):
    try:
        return linear_attention(*args, form=form, **options)
    except NoUsableForm:
        return linear_attention(*args, **options)


@with_function
def state_always_returned(*args, output_final_state=False, **options):
    return linear_attention(*args, output_final_state=True, **options)


MUTANTS = {
    "agrees_with_definition": [
        with_chunked(run)
        for run in (
            decay_off_by_one,
            initial_state_forgotten,
            final_state_not_decayed,
            scale_applied_twice,
            mask_off_by_one,
            heads_swapped,
            gradient_of_keys_lost_in_the_state,
            gradient_of_initial_state_lost,
            accumulated_in_bfloat16,
            row_never_written,
            rows_mixed,
            not_linear,
        )
    ],
    "agrees_at_awkward_lengths": [with_chunked(last_chunk_dropped)],
    "extreme_inputs_stay_finite_and_right": [with_chunked(overflowing)],
    "splitting_anywhere_changes_nothing": [
        with_chunked(initial_state_forgotten),
        with_chunked(final_state_not_decayed),
    ],
    "token_by_token_equals_whole": [
        replace(LINEAR, forms={**LINEAR.forms, "recurrent": Form(forgetful_step)})
    ],
    "absent_state_is_zeros": [state_always_returned],
    "the_future_changes_nothing": [with_chunked(mask_off_by_one)],
    "rows_do_not_see_each_other": [with_chunked(rows_mixed)],
    "packed_equals_separate": [boundaries_ignored],
    "memory_layout_changes_nothing": [with_chunked(storage_order_assumed)],
    "arguments_are_left_alone": [with_chunked(argument_written_to)],
    "repeated_calls_are_equal": [with_chunked(different_every_time)],
    "linear_in_its_value": [with_chunked(not_linear)],
    "half_precision_inputs_lose_only_their_own_rounding": [state_in_bfloat16, output_in_float32],
    "wrong_arguments_are_refused_by_name": [anything_accepted],
    "a_form_that_cannot_run_says_why": [silent_fallback],
    "cost_is_told_before_running": [replace(LINEAR, cost=lambda case: LINEAR.cost(case) * 2)],
}


SCAN = OPERATORS.get("diagonal_scan")
scan = SCAN.forms["chunked"].run


def fused(run):
    return replace(SCAN, forms={"native": Form(run, fused=True)})


def scanned(x, a, state):
    state = torch.zeros(x.shape[0], x.shape[2]) if state is None else state
    h, last = scan(x.float(), a.float(), state.float())
    return h.to(x.dtype), last


def room_after(tensor):
    whole = tensor.untyped_storage().nbytes() // tensor.element_size()
    return whole - tensor.storage_offset() - tensor.numel()


def one_written_too_far(x, a, state, cu_seqlens):
    h, last = scanned(x, a, state)
    o = torch.empty(h.shape, dtype=h.dtype)
    o = o.copy_(h)
    if room_after(o):
        o.detach().as_strided((1,), (1,), o.storage_offset() + o.numel()).zero_()
    return o, last


def one_read_too_far(x, a, state, cu_seqlens):
    h, last = scanned(x, a, state)
    beside = x.detach().as_strided((1,), (1,), x.storage_offset() + x.shape[2])
    return h + 0 * beside, last


def order_of_sums_by_threads(x, a, state, cu_seqlens):
    h, last = scanned(x, a, state)
    return h * (1 + 4e-7 * torch.get_num_threads()), last


broken = torch.library.Library("seqmix_tests", "FRAGMENT")
broken.define("returns_its_argument(Tensor x) -> Tensor")
broken.impl("returns_its_argument", lambda x: x, "CPU")


def operator_that_returns_its_argument(x, a, state, cu_seqlens):
    h, last = scanned(x, a, state)
    return torch.ops.seqmix_tests.returns_its_argument(h.detach()) + (h - h.detach()), last


@pytest.mark.parametrize(
    ("run", "law"),
    [
        (one_written_too_far, "memory_outside_is_neither_read_nor_written"),
        (one_read_too_far, "memory_outside_is_neither_read_nor_written"),
        (order_of_sums_by_threads, "threads_change_nothing"),
        (
            operator_that_returns_its_argument,
            "custom_operators_are_what_they_are_registered_as",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_laws_of_kernels_notice(run, law):
    assert where_broken(fused(run), law)


KERNEL_LAWS = {name for name, one in OPERATOR_LAWS.items() if "kernels" in one.needs}


def where_broken(mutant, law):
    """The form and case on which the law first notices, or None."""
    with installed(mutant):
        for one, form, case in checks(mutant):
            if one.name == law:
                try:
                    one(mutant, form, case)
                except AssertionError:
                    return form, case.name
    return None


def mutant_name(operator):
    if operator.function is not linear_attention:
        return operator.function.__closure__[0].cell_contents.__name__
    new = [form.run.__name__ for n, form in operator.forms.items() if form != LINEAR.forms[n]]
    return new[0] if new else "cost_doubled"


@pytest.mark.parametrize(
    ("law", "mutant"),
    [
        pytest.param(law, mutant, id=f"{law}-{mutant_name(mutant)}")
        for law, mutants in MUTANTS.items()
        for mutant in mutants
    ],
)
def test_law_notices(law, mutant):
    assert where_broken(mutant, law)
    with pytest.raises(AssertionError, match=r"-linear_attention-"):
        check_operator(mutant)


ATTENTION, DELTA = OPERATORS.get("attention"), OPERATORS.get("delta_rule")


def window_off_by_one(q, k, v, bias, logits, rule):
    wider = None if rule.window is None else rule.window + 1
    return ATTENTION.definition(q, k, v, bias, logits, rule._replace(window=wider))


def heads_grouped_in_turn(q, k, v, bias, logits, rule):
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat(1, 1, share, 1) for x in (k, v))
    return ATTENTION.definition(q, k, v, bias, logits, rule)


def queries_aligned_to_the_start(q, k, v, bias, logits, rule):
    if rule.causal:
        k, v = (x[:, : q.shape[1]] for x in (k, v))
        bias = bias if bias is None else bias[..., : q.shape[1]]
    return ATTENTION.definition(q, k, v, bias, logits, rule)


def learned_sinks_forgotten(q, k, v, bias, logits, rule):
    return ATTENTION.definition(q, k, v, bias, None, rule)


def first_keys_forgotten(q, k, v, bias, logits, rule):
    return ATTENTION.definition(q, k, v, bias, logits, rule._replace(first=0))


def gradient_of_bias_lost(q, k, v, bias, logits, rule):
    return ATTENTION.definition(q, k, v, bias if bias is None else bias.detach(), logits, rule)


def nothing_visible_is_an_average(q, k, v, bias, logits, rule):
    bias = bias if bias is None else bias.clamp_min(-1e9)
    return ATTENTION.definition(q, k, v, bias, logits, rule)


def decayed_after_writing(q, k, v, beta, g, state):
    if g is None:
        return DELTA.definition(q, k, v, beta, g, state)
    late = torch.cat([torch.zeros_like(g[:, :1]), g[:, :-1]], dim=1)
    return DELTA.definition(q, k, v, beta, late, state)


def beta_of_another_step(q, k, v, beta, g, state):
    steps = k.shape[1] // q.shape[1]
    beta = beta.unflatten(1, (-1, steps)).flip(2).flatten(1, 2)
    return DELTA.definition(q, k, v, beta, g, state)


def nothing_is_replaced(q, k, v, beta, g, state):
    if g is not None and k.shape[1] == q.shape[1]:
        return LINEAR.definition(q, k, v * beta[..., None], g, state)
    return DELTA.definition(q, k, v, beta, g, state)


def gates_bounded_too_early(q, k, v, beta, g, state):
    return DELTA.definition(q, k, v, beta, g if g is None else g.clamp_min(-15.0), state)


@pytest.mark.parametrize(
    ("operator", "form", "run", "law"),
    [
        (ATTENTION, "blocked", window_off_by_one, "agrees_with_definition"),
        (ATTENTION, "blocked", heads_grouped_in_turn, "agrees_with_definition"),
        (ATTENTION, "blocked", queries_aligned_to_the_start, "agrees_with_definition"),
        (ATTENTION, "blocked", learned_sinks_forgotten, "agrees_with_definition"),
        (ATTENTION, "blocked", first_keys_forgotten, "agrees_with_definition"),
        (ATTENTION, "blocked", gradient_of_bias_lost, "agrees_with_definition"),
        (
            ATTENTION,
            "blocked",
            nothing_visible_is_an_average,
            "extreme_inputs_stay_finite_and_right",
        ),
        (DELTA, "chunked", decayed_after_writing, "agrees_with_definition"),
        (DELTA, "chunked", beta_of_another_step, "agrees_with_definition"),
        (DELTA, "chunked", nothing_is_replaced, "agrees_with_definition"),
        (DELTA, "chunked", gates_bounded_too_early, "extreme_inputs_stay_finite_and_right"),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else getattr(value, "__name__", value),
)
def test_a_broken_form_is_noticed(operator, form, run, law):
    assert where_broken(replace(operator, forms={form: Form(run)}), law)


def test_every_law_has_a_mutant_that_breaks_it():
    assert MUTANTS.keys() | KERNEL_LAWS == OPERATOR_LAWS.keys()
    assert len(KERNEL_LAWS) == 3  # test_laws_of_kernels_notice


def test_the_checked_description_is_put_back():
    with pytest.raises(AssertionError):
        check_operator(with_chunked(heads_swapped))
    assert OPERATORS.get("linear_attention") is LINEAR


def test_poisoned_memory_is_nan_inside_and_only_inside():
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(3, dtype=torch.float64).new_empty(2).isnan().all()
        assert torch.empty_like(torch.zeros(2, 2)).isnan().all()
        assert torch.empty(2, dtype=torch.long).dtype == torch.long


@pytest.mark.parametrize("name", OPERATORS.names())
def test_the_definition_is_the_last_resort_and_says_so(name, monkeypatch):
    operator = OPERATORS.get(name)
    forms = {n: Form(form.run, lambda *_, **__: "not today") for n, form in operator.forms.items()}
    monkeypatch.setattr("seqmix.ops._operator._warned", set())
    inputs = operator.sample(operator.cases[0], torch.Generator().manual_seed(0))
    with (
        installed(replace(operator, forms=forms)),
        record_forms() as ran,
        pytest.warns(UserWarning, match="not today"),
    ):
        operator.function(**inputs)
    assert ran == {(name, "definition")}
