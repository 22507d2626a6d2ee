"""The laws that every operator is held to, on every form and case, through its public function.

A law is a function `law(operator, form, case)` that raises where it is broken. What it may change (time, batch
rows, the state) is read from `operator.axes`. Exact equality is judged in float64 wherever the form takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from seqmix.core.errors import NoUsableForm, UnknownName
from seqmix.core.numerics import assert_as_accurate
from seqmix.ops._operator import Case, Form, Operator
from seqmix.testing import _axes as ax
from seqmix.testing._axes import Inputs, Values
from seqmix.testing._custom import check_registration, recorded_calls
from seqmix.testing._memory import guarded_memory, poisoned_memory, surrounded
from seqmix.testing._trials import (
    Inapplicable,
    agree,
    by_definition,
    by_form,
    equal,
    installed,
    refuses,
    runnable,
    same_bits,
    sharp,
    sharpest,
)

HALF_AND_FULL = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Law:
    """A sentence that must hold; `needs` names what an operator, form or case must have for it to apply."""

    check: Callable[[Operator, str, Case], None]
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.check.__name__

    def applies(self, operator: Operator, form: str, case: Case) -> bool:
        has = {
            "kernels": operator.forms[form].fused,
            "state": operator.has_state,
            "packing": ax.accepts(operator, "cu_seqlens") and case.get("S", case["T"]) == case["T"],
            "causality": case.get("causal", True) is not False,
            "extreme": operator.extreme is not None,
            "value": operator.value is not None,
        }
        return all(has[need] for need in self.needs)

    def __call__(self, operator: Operator, form: str, case: Case) -> None:
        self.check(operator, form, case)


LAWS: list[Law] = []


def law(*needs: str) -> Callable[[Callable[[Operator, str, Case], None]], Law]:
    def register(check: Callable[[Operator, str, Case], None]) -> Law:
        LAWS.append(Law(check, needs))
        return LAWS[-1]

    return register


@law()
def agrees_with_definition(operator: Operator, form: str, case: Case) -> None:
    """Results and all gradients, the initial state's included, are those of the definition."""
    agree(operator, form, runnable(operator, form, case))


@law()
def agrees_at_awkward_lengths(operator: Operator, form: str, case: Case) -> None:
    """One token, two, a chunk and one more or less, two chunks and a bit, a prime."""
    chunk = operator.chunk
    ran = []
    for length in sorted({1, 2, chunk - 1, chunk, chunk + 1, 2 * chunk + 3, 101}):
        here = ax.with_length(case.at(B=1), length)
        try:
            dtype, tolerance = sharpest(operator, form, here)
            got = by_form(operator, form, here, dtype)
        except NoUsableForm:
            continue
        ran.append(length)
        exact = by_definition(operator, here, torch.float64)
        for part in (0, 1):
            equal(got[part], exact[part] if got[part] else {}, tolerance, f" at T={length}")
    if not ran:
        raise Inapplicable(f"{form} runs none of the lengths")


@law("extreme")
def extreme_inputs_stay_finite_and_right(operator: Operator, form: str, case: Case) -> None:
    """No overflow and no NaN, forward or backward, at the ends of the legal range."""
    case = runnable(operator, form, case)
    for part in by_form(operator, form, case, torch.float32, extreme=True):
        for name, value in part.items():
            if not bool(value.isfinite().all()):
                raise AssertionError(f"{name} is not finite")
    agree(operator, form, case, extreme=True)


@law("state")
def splitting_anywhere_changes_nothing(operator: Operator, form: str, case: Case) -> None:
    """A text in two calls, the state handed over, gives what one call gives."""
    case, inputs, tolerance = sharp(operator, form, case, crossing=True)
    whole, length = ax.call(operator, form, inputs), case["T"]
    for border in sorted({1, length // 2, operator.chunk, length - 1} & {*range(1, length)}):
        head = ax.call(operator, form, ax.cut(operator, case, inputs, 0, border))
        rest = ax.cut(operator, case, inputs, border, length)
        tail = ax.call(operator, form, {**rest, "initial_state": head["final_state"]})
        joined = {**tail, "o": torch.cat([head["o"], tail["o"]], dim=1)}
        equal(joined, whole, tolerance, f" cut at {border}")


@law("state")
def token_by_token_equals_whole(operator: Operator, form: str, case: Case) -> None:
    """Decoding: one token per call, in whatever form is chosen for it."""
    case, inputs, tolerance = sharp(operator, form, case, crossing=True)
    state, outputs = inputs.get("initial_state"), []
    for t in range(case["T"]):
        token = {**ax.cut(operator, case, inputs, t, t + 1), "initial_state": state}
        step = ax.call(operator, None, token)
        state = step["final_state"]
        outputs.append(step["o"])
    steps = {**step, "o": torch.cat(outputs, dim=1)}
    equal(steps, ax.call(operator, form, inputs), tolerance)


@law("state")
def absent_state_is_zeros(operator: Operator, form: str, case: Case) -> None:
    """Without `initial_state` a text begins with zeros; without `output_final_state` no state comes back."""
    case, inputs, tolerance = sharp(operator, form, case)
    state = inputs.pop("initial_state")
    zeros = ax.call(operator, form, {**inputs, "initial_state": torch.zeros_like(state)})
    equal(ax.call(operator, form, inputs), zeros, tolerance)
    output, nothing = operator.function(**inputs, form=form)
    if nothing is not None:
        raise AssertionError("a final state came back without output_final_state")
    equal({"o": output}, {"o": zeros["o"]}, tolerance)


@law("causality")
def the_future_changes_nothing(operator: Operator, form: str, case: Case) -> None:
    """Other tokens after t leave the outputs up to t as they were."""
    case, inputs, tolerance = sharp(operator, form, case, crossing=True)
    length = case["T"]
    other = ax.draw(
        operator, case, seed=1, dtype=next(iter(ax.tensors(operator, inputs).values())).dtype
    )
    shift = case.get("S", length) - length
    whole = ax.call(operator, form, inputs)["o"]
    for t in sorted({0, length // 2, length - 2} & set(range(length - 1))):

        def keep_past(name: str, tensor: Tensor, t: int = t) -> Tensor:
            for dimension, letter, times in ax.places(operator, case, name, tensor, "TS"):
                past = (t + 1 + (shift if letter == "S" else 0)) * times
                future = other[name].narrow(dimension, past, tensor.shape[dimension] - past)
                tensor = torch.cat([tensor.narrow(dimension, 0, past), future], dimension)
            return tensor

        changed = ax.call(operator, form, ax.replace_tensors(operator, inputs, keep_past))["o"]
        equal({"o": changed[:, : t + 1]}, {"o": whole[:, : t + 1]}, tolerance, f" up to t={t}")


@law()
def rows_do_not_see_each_other(operator: Operator, form: str, case: Case) -> None:
    """A row alone gives what it gives in company, and rows in another order give the same, reordered."""
    case, inputs, tolerance = sharp(operator, form, case)
    whole = ax.call(operator, form, inputs)
    orders = [[row] for row in range(case["B"])] + [
        [*reversed(range(case["B"]))],
        [case["B"] - 1] * 3,
    ]
    for order in orders:
        got = ax.call(operator, form, ax.rows(operator, case, inputs, order))
        equal(got, {n: x[order] for n, x in whole.items()}, tolerance, f" of rows {order}")


@law("packing")
def packed_equals_separate(operator: Operator, form: str, case: Case) -> None:
    """Texts end to end with `cu_seqlens`, an empty one too, give what each gives alone, gradients included."""
    case = runnable(operator, form, case, crossing=True)
    length = case["T"]
    bounds = sorted({0, 1, length // 3 + 1, length}) if length > 3 else [*range(length + 1)]
    bounds = [bounds[0], bounds[1], *bounds[1:]]  # the second text is empty
    texts = len(bounds) - 1
    dtype, tolerance = sharpest(operator, form, case)
    alone = case.at(B=1)
    inputs = ax.draw(operator, alone, dtype=dtype)
    if operator.has_state:
        inputs["initial_state"] = ax.draw(operator, case.at(B=texts), dtype=dtype)["initial_state"]

    def packed(given: Inputs) -> Values:
        return ax.call(operator, form, {**given, "cu_seqlens": torch.tensor(bounds)})

    def separate(given: Inputs) -> Values:
        results: dict[str, list[Tensor]] = {}
        for text, (start, stop) in enumerate(pairwise(bounds)):
            own = ax.cut(operator, alone, given, start, stop)
            if operator.has_state:
                own["initial_state"] = given["initial_state"][text : text + 1]
            if stop > start:
                for name, value in ax.call(operator, "definition", own).items():
                    results.setdefault(name, []).append(value)
            elif operator.has_state:
                results.setdefault("final_state", []).append(own["initial_state"])
        return {n: torch.cat(parts, dim=1 if n == "o" else 0) for n, parts in results.items()}

    if form in operator.forms and not operator.forms[form].trains:
        equal(packed(inputs), separate(inputs), tolerance)
        return
    got, wanted = (ax.differentiate(operator, inputs, way) for way in (packed, separate))
    equal(got[0], wanted[0], tolerance)
    equal(got[1], wanted[1], tolerance)


@law()
def memory_layout_changes_nothing(operator: Operator, form: str, case: Case) -> None:
    """Strided, transposed and expanded arguments mean what their contiguous copies mean."""
    case, inputs, tolerance = sharp(operator, form, case)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
        "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        "expanded": lambda x: x[:1].expand_as(x),
    }
    for what, view in ways.items():
        viewed = {**inputs, **{n: view(x) for n, x in ax.tensors(operator, inputs).items()}}
        copied = ax.replace_tensors(
            operator, viewed, lambda _, x: x.clone(memory_format=torch.contiguous_format)
        )
        got, wanted = (ax.call(operator, form, given) for given in (viewed, copied))
        equal(got, wanted, tolerance, f" of {what} arguments")


@law()
def arguments_are_left_alone(operator: Operator, form: str, case: Case) -> None:
    """Nothing writes to an argument, not even the same value."""
    case = runnable(operator, form, case)
    inputs = ax.draw(operator, case)
    given = ax.tensors(operator, inputs)
    before = {name: (x._version, x.clone()) for name, x in given.items()}
    with torch.no_grad():
        ax.call(operator, form, inputs)
    for name, (version, copy) in before.items():
        if given[name]._version != version or not torch.equal(given[name], copy):
            raise AssertionError(f"`{name}` was written to")


@law()
def repeated_calls_are_equal(operator: Operator, form: str, case: Case) -> None:
    """The same arguments give the same bits, forward and backward, whatever dtype is the default."""
    case = runnable(operator, form, case)
    first = by_form(operator, form, case, torch.float32)
    second = by_form(operator, form, case, torch.float32, default=torch.bfloat16)
    same_bits(first, second, "in a second call, with another default dtype,")


@law("kernels")
def memory_outside_is_neither_read_nor_written(operator: Operator, form: str, case: Case) -> None:
    """Guard words around all that is allocated stay as they were; NaN around the arguments is not seen."""
    case = runnable(operator, form, case)
    for dtype in HALF_AND_FULL:
        try:
            plain = by_form(operator, form, case, dtype)
            with guarded_memory():
                got = by_form(operator, form, case, dtype, place=surrounded)
        except NoUsableForm:
            continue
        same_bits(got, plain, f"{dtype}, with NaN around the arguments,")


@law("kernels")
def threads_change_nothing(operator: Operator, form: str, case: Case) -> None:
    """One thread and two give the same bits, forward and backward."""
    case = runnable(operator, form, case)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = by_form(operator, form, case, torch.float32)
        torch.set_num_threads(2)
        same_bits(by_form(operator, form, case, torch.float32), alone, "with two threads")
    finally:
        torch.set_num_threads(before)


@law("kernels")
def custom_operators_are_what_they_are_registered_as(
    operator: Operator, form: str, case: Case
) -> None:
    """Schema, shape function and gradient of every custom operator that a call uses (`torch.library.opcheck`)."""
    case = runnable(operator, form, case)
    with recorded_calls() as calls:
        by_form(operator, form, case, torch.float32)
    if not calls:
        raise Inapplicable(f"{form} calls no custom operator")
    for one, (args, kwargs) in calls.items():
        try:
            check_registration(one, args, kwargs)
        except Exception as error:
            raise AssertionError(f"{one}: {error}") from error


@law("value")
def linear_in_its_value(operator: Operator, form: str, case: Case) -> None:
    """From an empty state, the output is linear in the argument that the operator names as its value."""
    case, inputs, tolerance = sharp(operator, form, case)
    inputs.pop("initial_state", None)
    value = str(operator.value)
    other = torch.flip(inputs[value], dims=[1])
    mixed = ax.call(operator, form, {**inputs, value: inputs[value] - 0.5 * other})["o"]
    first, second = (
        ax.call(operator, form, {**inputs, value: x})["o"] for x in (inputs[value], other)
    )
    equal({"o": mixed}, {"o": first - 0.5 * second}, tolerance)


@law()
def half_precision_inputs_lose_only_their_own_rounding(
    operator: Operator, form: str, case: Case
) -> None:
    """bfloat16 and float16 arguments: computed in float32, rounded once at the end; states stay float32."""
    case = runnable(operator, form, case)
    ran = []
    for dtype in (torch.bfloat16, torch.float16):
        drawn = ax.tensors(operator, ax.draw(operator, case))
        rounded = {n: x if n == "initial_state" else x.to(dtype) for n, x in drawn.items()}
        inputs = {**ax.draw(operator, case), **rounded}

        def run(form: str, given: Inputs, dtype: torch.dtype = dtype) -> tuple[Values, Values]:
            return ax.differentiate(
                operator, given, lambda i: ax.call(operator, form, i), cotangent_dtype=dtype
            )

        exact = run("definition", ax.cast(operator, inputs, torch.float64))
        plain = run("definition", ax.cast(operator, inputs, torch.float32))
        trains = form not in operator.forms or operator.forms[form].trains
        try:
            got = run(form, inputs) if trains else (ax.call(operator, form, inputs), {})
        except NoUsableForm:
            continue
        ran.append(dtype)
        for part in (0, 1):
            for name, value in got[part].items():
                wide = name.startswith("final_state") or name == "gradient of initial_state"
                wanted = torch.float32 if wide else dtype
                if value.dtype != wanted:
                    raise AssertionError(
                        f"{name} of {dtype} inputs is {value.dtype}, wanted {wanted}"
                    )
                budget = plain[part][name] if wide else plain[part][name].to(dtype)
                assert_as_accurate(value, exact[part][name], budget, what=f"{name} in {dtype}")
    if not ran:
        raise Inapplicable(f"{form} takes neither bfloat16 nor float16")


@law()
def wrong_arguments_are_refused_by_name(operator: Operator, form: str, case: Case) -> None:
    """A missing axis, a disagreeing size, no tokens, an integer dtype: the error names the argument."""
    case = runnable(operator, form, case)
    inputs = ax.draw(operator, case)
    given = ax.tensors(operator, inputs)
    letters = {n: ax.layout(operator, case, n, x) for n, x in given.items()}
    for name, tensor in given.items():
        layouts = operator.axes[name]
        legal = {len(one.split()) for one in ([layouts] if isinstance(layouts, str) else layouts)}
        wrong = {"an integer dtype": tensor.long()}
        if tensor.ndim - 1 not in legal:
            wrong["a missing axis"] = tensor[..., 0]
        if tensor.ndim + 1 not in legal:
            wrong["an extra axis"] = tensor.unsqueeze(0)
        if any(letters[name][-1] in other for n, other in letters.items() if n != name):
            wrong["a last size that disagrees"] = torch.cat([tensor, tensor[..., :1]], dim=-1)
        if "T" in letters[name]:
            wrong["no tokens, so a length that disagrees,"] = tensor[:, :0]
        for what, value in wrong.items():
            blamed = given if "disagrees" in what else [name]
            refuses(operator, form, {**inputs, name: value}, blamed, f"{what} of `{name}`")


@law()
def a_form_that_cannot_run_says_why(operator: Operator, form: str, case: Case) -> None:
    """Forcing it raises with its reason, and nothing else runs instead; so does a form that does not exist."""
    case = runnable(operator, form, case)
    inputs, reason = ax.draw(operator, case), "the moon is full"
    refusing = Form(operator.forms[form].run, lambda *_, **__: reason)
    with installed(replace(operator, forms={**operator.forms, form: refusing})):
        try:
            ax.call(operator, form, inputs)
        except NoUsableForm as error:
            if reason not in str(error):
                raise AssertionError(f"the error does not say why: {error}") from error
        else:
            raise AssertionError(f"{form} ran although it cannot")
    try:
        ax.call(operator, "no_such_form", inputs)
    except UnknownName:
        return
    raise AssertionError("a form that does not exist was accepted")


@law()
def cost_is_told_before_running(operator: Operator, form: str, case: Case) -> None:
    """Timing cases exist and cost something; the state takes the bytes that the cost says."""
    if not operator.timing:
        raise AssertionError("there are no timing cases")
    for timing in operator.timing:
        cost = operator.cost(timing)
        if not (cost.flops > 0 and cost.bytes > 0):
            raise AssertionError(f"{timing.name} costs {cost}")
    if operator.has_state:
        case = runnable(operator, form, case)
        results = ax.call(operator, form, ax.draw(operator, case))
        taken = sum(x.numel() * x.element_size() for n, x in results.items() if n != "o")
        if operator.cost(case).state_bytes != taken:
            raise AssertionError(
                f"the state takes {taken} bytes, the cost says {operator.cost(case)}"
            )


OPERATOR_LAWS: dict[str, Law] = {one.name: one for one in LAWS}


def checks(operator: Operator) -> Iterator[tuple[Law, str, Case]]:
    """Every law that applies, on every form and case of the operator."""
    for case in operator.cases:
        for form in operator.forms:
            for one in OPERATOR_LAWS.values():
                if one.applies(operator, form, case):
                    yield one, form, case


def check_operator(operator: Operator) -> None:
    """Runs every law on every form and case; raises `AssertionError` naming the first that is broken.

    The operator must be the `OPERATOR` of its public function's module, or a changed copy of it.
    """
    with installed(operator), poisoned_memory():
        for one, form, case in checks(operator):
            try:
                one(operator, form, case)
            except Inapplicable:
                continue
            except Exception as error:
                where = f"{one.name}-{operator.name}-{form}-{case.name}"
                raise AssertionError(f"{where}: {error}") from error
