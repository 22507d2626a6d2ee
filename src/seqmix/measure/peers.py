"""What others have for the same computations: torch itself, the references of transformers, and mambapy.

A peer that is not installed is left out with that reason. Its inputs are ours, brought into its layout before
the clock starts; its output is checked like that of a form.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.measure.calls import Call, Inputs

MODELS = "transformers.models"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A function of another package that does one timing case of an operator.

    `prepare(function, inputs)` makes the call. With `same` False it computes something else of the same use,
    so that only its speed compares.
    """

    name: str
    operator: str
    case: str
    module: str
    function: str
    prepare: Callable[[Callable[..., Any], Inputs], Call]
    same: bool = True

    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        package = self.module.partition(".")[0]
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed" if error.name == package else str(error)
        if not hasattr(module, self.function):
            return f"this version of {package} has no {self.module}.{self.function}"
        return None

    def call(self, inputs: Inputs) -> Call:
        """The peer on copies of these inputs of our operator."""
        function = getattr(importlib.import_module(self.module), self.function)
        copies = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        return self.prepare(function, copies)


def _variables(inputs: Inputs, *names: str) -> list[Tensor]:
    return [inputs[name] for name in names if inputs.get(name) is not None]


def _last(x: Tensor) -> Tensor:
    """`[B, T, D]` with time last and contiguous, as CUDA kernels for convolutions and scans want it."""
    return x.transpose(1, 2).contiguous()


def _sdpa(function: Callable[..., Tensor], inputs: Inputs) -> Call:
    q, k, v = (inputs[name].transpose(1, 2).contiguous() for name in "qkv")
    causal = q.shape[2] == k.shape[2]
    grouped = q.shape[1] != k.shape[1]

    def forward() -> Tensor:
        return function(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    return Call(forward, [q, k, v])


def _delta_rule(function: Callable[..., Any], inputs: Inputs) -> Call:
    names = ("q", "k", "v", "g", "beta")
    state = inputs.get("initial_state")
    options: dict[str, Any] = {
        "use_qk_l2norm_in_kernel": inputs.get("qk_l2norm", False),
        "initial_state": state,
        "output_final_state": state is not None,
    }

    def forward() -> Tensor:
        output: Tensor = function(*(inputs[n] for n in names), **options)[0]
        return output

    return Call(forward, _variables(inputs, *names))


def _selective_scan(function: Callable[..., Tensor], inputs: Inputs) -> Call:
    u, delta, B, C = (_last(inputs[name]) for name in ("u", "delta", "B", "C"))

    def forward() -> Tensor:
        return function(u, delta, inputs["A"], B, C).transpose(1, 2)

    return Call(forward, [u, delta, inputs["A"], B, C])


def _parallel_scan(function: Callable[..., Tensor], inputs: Inputs) -> Call:
    u, delta, A, B, C = (inputs[name] for name in ("u", "delta", "A", "B", "C"))

    def forward() -> Tensor:
        decay = torch.exp(delta.float().unsqueeze(-1) * A)
        added = (delta * u).float().unsqueeze(-1) * B.float().unsqueeze(2)
        states = function(decay, added)
        return (states @ C.float().unsqueeze(-1)).squeeze(-1).to(u.dtype)

    return Call(forward, [u, delta, A, B, C])


def _state_space_dual(function: Callable[..., Tensor], inputs: Inputs) -> Call:
    names = ("x", "dt", "A", "B", "C")

    def forward() -> Tensor:
        return function(*(inputs[name] for name in names), 256).to(inputs["x"].dtype)

    return Call(forward, _variables(inputs, *names))


def _convolution(function: Callable[..., Tensor], inputs: Inputs) -> Call:
    x, dtype = _last(inputs["x"]), inputs["x"].dtype
    weight, bias = inputs["weight"].to(dtype), inputs["bias"].to(dtype)

    def forward() -> Tensor:
        return function(x, weight, bias, inputs.get("activation")).transpose(1, 2)

    return Call(forward, [x, weight, bias])


TORCH_ATTENTION = Peer(
    name="torch SDPA",
    operator="attention",
    case="causal",
    module=F.__name__,
    function="scaled_dot_product_attention",
    prepare=_sdpa,
)
TRANSFORMERS_DELTA_RULE = Peer(
    name="transformers, chunks",
    operator="delta_rule",
    case="scalar_gate",
    module=f"{MODELS}.qwen3_next.modeling_qwen3_next",
    function="torch_chunk_gated_delta_rule",
    prepare=_delta_rule,
)
TRANSFORMERS_DELTA_STEP = Peer(
    name="transformers, token loop",
    operator="delta_rule",
    case="scalar_gate",
    module=f"{MODELS}.qwen3_next.modeling_qwen3_next",
    function="torch_recurrent_gated_delta_rule",
    prepare=_delta_rule,
)
TRANSFORMERS_SELECTIVE_SCAN = Peer(
    name="transformers",
    operator="selective_scan",
    case="one_text",
    module=f"{MODELS}.mamba.modeling_mamba",
    function="mamba_selective_scan",
    prepare=_selective_scan,
)
PEERS = (
    TORCH_ATTENTION,
    Peer(
        name="torch SDPA (softmax attention)",
        operator="linear_attention",
        case="scalar_decay",
        module=F.__name__,
        function="scaled_dot_product_attention",
        prepare=_sdpa,
        same=False,
    ),
    TRANSFORMERS_DELTA_RULE,
    TRANSFORMERS_DELTA_STEP,
    Peer(
        name="transformers, chunks",
        operator="delta_rule",
        case="vector_gate",
        module=f"{MODELS}.kimi_linear.modeling_kimi_linear",
        function="chunk_kimi_delta_attention",
        prepare=_delta_rule,
    ),
    TRANSFORMERS_SELECTIVE_SCAN,
    Peer(
        name="mambapy",
        operator="selective_scan",
        case="one_text",
        module="mambapy.pscan",
        function="pscan",
        prepare=_parallel_scan,
    ),
    Peer(
        name="transformers",
        operator="state_space_dual",
        case="one_group",
        module=f"{MODELS}.mamba2.modeling_mamba2",
        function="mamba2_chunk_scan",
        prepare=_state_space_dual,
    ),
    Peer(
        name="transformers",
        operator="short_convolution",
        case="four_taps",
        module=f"{MODELS}.mamba.modeling_mamba",
        function="causal_conv1d_fn",
        prepare=_convolution,
    ),
)


def peers_of(operator: str, case: str) -> list[Peer]:
    """Those of a timing case, whether installed or not."""
    return [peer for peer in PEERS if (peer.operator, peer.case) == (operator, case)]
