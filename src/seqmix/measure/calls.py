"""One computation on given inputs, as calls that can be checked, timed and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqmix.core.numerics import relative_error
from seqmix.ops import Case
from seqmix.ops._operator import Operator

Inputs = dict[str, Any]
PASSES = ("forward", "forward and backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {
    torch.float32: 2e-4,
    torch.bfloat16: 3e-2,
}  # relative error that still counts as right
GATES = ("g", "beta", "dt")  # stay in float32, as everything does that has no time axis


@dataclass(frozen=True)
class Call:
    """What computes an output, and the tensors by which it is differentiated."""

    forward: Callable[[], Tensor]
    variables: Sequence[Tensor] = field(default_factory=list)

    def run(self) -> Tensor:
        """The output, without a graph."""
        with torch.inference_mode():
            return self.forward()

    def differentiate(self, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of every variable, for this gradient of the output."""
        for variable in self.variables:
            variable.requires_grad_()
        return torch.autograd.grad(self.forward(), self.variables, cotangent, allow_unused=True)

    def timed(self, passes: str) -> Callable[[], object]:
        """The call to be timed, forward or forward and backward; both include what a user would wait for."""
        if passes == "forward":
            return self.run
        cotangent = self.cotangent()
        return lambda: self.differentiate(cotangent)

    def cotangent(self) -> Tensor:
        """Random numbers like the output, always the same for the same shape."""
        with torch.no_grad():
            output = self.forward()
        generator = torch.Generator().manual_seed(0)
        return torch.randn(output.shape, generator=generator).to(output.dtype)


def draw(operator: Operator, case: Case, dtype: torch.dtype) -> Inputs:
    """The operator's own random inputs: data in `dtype`, gates and whatever has no time axis in float32."""
    return cast(operator, operator.sample(case, torch.Generator().manual_seed(0)), dtype)


def cast(operator: Operator, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: value.to(dtype) if _is_data(operator, name, value) else value
        for name, value in inputs.items()
    }


def _is_data(operator: Operator, name: str, value: Any) -> bool:
    layouts = operator.axes.get(name, "")
    letters = (layouts if isinstance(layouts, str) else layouts[0]).replace("*", " ").split()
    timed = "T" in letters or "S" in letters
    return isinstance(value, Tensor) and value.is_floating_point() and timed and name not in GATES


def call(operator: Operator, inputs: Inputs, form: str | None = None) -> Call:
    """The operator's public function on copies of these inputs."""
    inputs = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    variables = [v for n, v in inputs.items() if n in operator.axes and isinstance(v, Tensor)]

    def forward() -> Tensor:
        result = operator.function(**inputs, form=form)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    return Call(forward, variables)


def exactly(operator: Operator, inputs: Inputs) -> Call:
    """The same in float64, which the PyTorch forms compute: what the others are compared with."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    return call(operator, wide)


def disagreement(got: Call, exact: Call, dtype: torch.dtype, *, gradients: bool) -> str | None:
    """None if output, and gradients if wanted, are within the tolerance of the dtype; else where not."""
    allowed = TOLERANCES[dtype]
    error = relative_error(got.run(), exact.run())
    if not error <= allowed:  # NaN fails too
        return f"output off by {error:.1e} of its size, allowed {allowed:.0e}"
    if gradients:
        cotangent = got.cotangent()
        found = got.differentiate(cotangent)
        wanted = exact.differentiate(cotangent.double())
        for place, (mine, right) in enumerate(zip(found, wanted, strict=True)):
            if mine is not None and right is not None:
                error = relative_error(mine, right)
                if not error <= allowed:
                    return f"gradient {place + 1} off by {error:.1e} of its size, allowed {allowed:.0e}"
    return None


def num_bytes(inputs: Inputs, output: Tensor) -> int:
    """Bytes of all tensors that go in and of the one that comes out."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in [*tensors, output])
