"""Signed selective scan: a selective scan whose transitions reach from -1 to 1, so that a state can flip.

    h_t = (2 exp(delta_t A) - 1) h_{t-1} + delta_t u_t B_t        y_t = C_t . h_t + D u_t

Arguments, preparation and forms are those of `selective_scan`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from seqmix.ops._operator import Case
from seqmix.ops.selective_scan import OPERATOR as UNSIGNED
from seqmix.ops.selective_scan import SIZES, definition, scan


def signed_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = (2 exp(delta_t A) - 1) h_{t-1} + delta_t u_t B_t, y_t = (C_t . h_t + D u_t) * silu(z_t).

    Arguments, shapes, results and errors are those of `seqmix.ops.selective_scan`.

    Source: Grazzi et al. 2024 (arXiv:2411.12537), section 4.3.
    """
    return scan(
        OPERATOR,
        u,
        delta,
        A,
        B,
        C,
        D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        form=form,
    )


OPERATOR = replace(
    UNSIGNED,
    function=signed_selective_scan,
    equation=r"h_t = (2 e^{\Delta_t A} - 1) h_{t-1} + \Delta_t u_t B_t,\quad y_t = C_t^\top h_t + D u_t",
    source="Grazzi et al. 2024 (arXiv:2411.12537)",
    definition=partial(definition, negative=True),
    forms={
        name: replace(form, run=partial(form.run, negative=True))
        for name, form in UNSIGNED.forms.items()
    },
    cases=[
        Case("flips", {**SIZES, "T": 70}, {"bias": 1.0}),
        Case("gated", SIZES, {"bias": 1.0, "softplus": True, "gated": True}),
    ],
)
