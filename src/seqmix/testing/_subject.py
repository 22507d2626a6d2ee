"""What the laws of mixers and of channels share: a class with one configuration, and other values for its fields."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.core.config import Config
from seqmix.core.errors import SeqmixError
from seqmix.core.numerics import assert_equal_within, relative_error

BATCH, LENGTH = 2, 23
SIZES = {"width": 32, "heads": 2}
SMALLEST_RMS, LARGEST_RMS = 0.01, 3.0  # of the output, for an input of unit variance


@dataclass(frozen=True)
class Subject:
    """One class in one configuration: `default` (at small sizes), or one of the class's `examples`."""

    kind: type[Any]
    name: str
    fields: Mapping[str, Any]

    def config(self, **changes: Any) -> Config:
        return self.kind.Config.from_dict({**self.fields, **changes})

    def build(self, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
        """The module, with the same random weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.kind(self.config(**changes)).to(dtype)

    def tokens(
        self,
        length: int = LENGTH,
        *,
        batch: int = BATCH,
        seed: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """A random input [batch, length, width] of unit variance."""
        generator = torch.Generator().manual_seed(seed)
        width = self.fields["width"]
        return torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype)


Law = Callable[[Subject], None]


def subjects(kind: type[Any]) -> list[Subject]:
    """The configurations in which a class is held to the laws."""
    small = {name: size for name, size in SIZES.items() if name in kind.Config.fields()}
    examples = {"default": {}, **kind.examples}
    return [Subject(kind, name, {**small, **fields}) for name, fields in examples.items()]


def of_the_class(law: Law) -> Law:
    """Marks a law that looks at all configurations of the class itself, so that one of them is enough to ask it of."""
    law.is_of_the_class = True
    return law


def cases(kind: type[Any], laws: Sequence[Law]) -> Iterator[tuple[Law, Subject]]:
    """Every configuration with every law; a law of the class with the first configuration only."""
    for place, subject in enumerate(subjects(kind)):
        for law in laws:
            if place == 0 or not getattr(law, "is_of_the_class", False):
                yield law, subject


def exception(subject: Subject, law: Law) -> str | None:
    """Why this class says that it does not keep this law (`law`, or `law[example]`); None if it should."""
    declared = subject.kind.exceptions
    return declared.get(law.__name__) or declared.get(f"{law.__name__}[{subject.name}]")


def check(kind: type[Any], laws: Sequence[Law]) -> None:
    """Holds every configuration of `kind` to every law; raises AssertionError at the first that it breaks.

    A law named in `kind.exceptions` must fail: an exception that is no longer needed is an error too.
    """
    for law, subject in cases(kind, laws):
        reason = exception(subject, law)
        try:
            law(subject)
        except Exception as error:
            if reason is None:
                raise AssertionError(
                    f"{kind.__name__} ({subject.name}) breaks {law.__name__}: {error}"
                ) from error
        else:
            if reason is not None:
                raise AssertionError(
                    f"{kind.__name__} ({subject.name}) keeps {law.__name__}: take it out of `exceptions`."
                )


def other_values(subject: Subject, field: str) -> Iterator[Any]:
    """Other values for a field: those of the class's configurations, then some that its type suggests."""
    value = getattr(subject.config(), field)
    suggested = [getattr(other.config(), field) for other in subjects(subject.kind)]
    hint = typing.get_type_hints(subject.kind.Config)[field]
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    for kind in typing.get_args(hint) if union else [hint]:
        if kind is bool:
            suggested.append(not value)
        elif kind is int:
            base = value if isinstance(value, int) else 4
            suggested += [base * 2, base + 1, base // 2, 1, 2, 4, 0]
        elif kind is float:
            size = value if isinstance(value, int | float) else 4.0
            suggested += [size * 2.0, size / 2.0, 0.0, 0.5, 1.0]
        elif kind is types.NoneType:
            suggested.append(None)
        elif typing.get_origin(kind) is typing.Literal:
            suggested += typing.get_args(kind)
    yield from (other for other in suggested if other != value)


def assert_field_has_an_effect(
    subject: Subject, field: str, output: Callable[[nn.Module], Tensor]
) -> None:
    """Another legal value must change the parameters, their initial values, the output or what training does.

    In any of the class's configurations: a field may matter only beside another.
    """
    if not any(_has_effect(each, field, output) for each in subjects(subject.kind)):
        raise AssertionError(
            f"{subject.kind.__name__}.Config.{field} has no effect (tried {[*other_values(subject, field)]}). "
            "Remove it, or name a legal value that has one in the class's `examples`."
        )


def _has_effect(subject: Subject, field: str, output: Callable[[nn.Module], Tensor]) -> bool:
    before, module = subject.build().state_dict(), subject.build()
    y, trained = output(module), None
    for value in other_values(subject, field):
        try:
            other = subject.build(**{field: value})
        except SeqmixError:
            continue
        after = other.state_dict()
        if before.keys() != after.keys():
            return True
        if any(before[n].shape != after[n].shape or not before[n].equal(after[n]) for n in before):
            return True
        y_other = output(other)
        if not y.equal(y_other):
            return True
        if any(True for _ in other.buffers()):  # which a backward pass may move
            if trained is None:
                y.square().sum().backward()
                trained = module.state_dict()
            y_other.square().sum().backward()
            if any(not trained[n].equal(after[n]) for n in trained):
                return True
    return False


def assert_every_parameter_gets_a_gradient(module: nn.Module, output: Callable[[], Tensor]) -> None:
    """Weights are moved a little first, so that a factor initialised to zero does not hide the others."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    y = output()
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert parameter.grad.isfinite().all(), f"{name} gets a gradient that is not finite"
        assert parameter.grad.any(), f"{name} gets a gradient of zero"


def assert_moderate_scale(y: Tensor) -> None:
    rms = float(y.detach().square().mean().sqrt())
    wanted = f"between {SMALLEST_RMS} and {LARGEST_RMS}"
    assert SMALLEST_RMS <= rms <= LARGEST_RMS, (
        f"the output's root mean square is {rms:.3g}, wanted {wanted}"
    )


def assert_round_trip(subject: Subject, output: Callable[[nn.Module], Tensor]) -> None:
    """Configuration through JSON, weights through a state dict, into a module with other initial weights."""
    module = subject.build()
    values = json.loads(json.dumps(module.config.to_dict()))
    config = subject.kind.Config.from_dict(values)
    assert config == module.config, f"{module.config} became {config} in JSON"
    other = subject.build(seed=1)
    other.load_state_dict(module.state_dict())
    assert output(other).equal(output(module)), "the same weights gave another output"


def assert_builds_on_meta(subject: Subject, output: Callable[[nn.Module], Tensor]) -> None:
    """Built without memory, then given weights: nothing but the state dict may matter."""
    module = subject.build()
    with torch.device("meta"):
        empty = subject.kind(subject.config())
    real = [n for n, x in [*empty.named_parameters(), *empty.named_buffers()] if not x.is_meta]
    assert not real, f"{real} took memory on the meta device"
    filled = empty.to_empty(device="cpu")
    for tensor in [*filled.parameters(), *filled.buffers()]:
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 0)
    filled.load_state_dict(module.state_dict())
    assert output(filled).equal(output(module)), (
        "something outside the state dict was lost on the meta device"
    )


def assert_deep_copy_is_independent(
    subject: Subject, output: Callable[[nn.Module], Tensor]
) -> None:
    module = subject.build()
    copy = deepcopy(module)
    before = output(module)
    assert output(copy).equal(before), "a deep copy computes something else"
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter += 0.1
    assert output(module).equal(before), "changing a deep copy changed the original"
    assert not output(copy).equal(before), "the deep copy does not use its own parameters"


def assert_bfloat16_is_near(
    subject: Subject, output: Callable[[nn.Module, torch.dtype], Tensor]
) -> None:
    """Against float32 on the same rounded weights and inputs, an output may lose 2**-8 about a dozen times."""
    module = subject.build(dtype=torch.bfloat16)
    y = output(module, torch.bfloat16)
    assert y.dtype == torch.bfloat16, f"a bfloat16 input gave {y.dtype}"
    exact = output(deepcopy(module).float(), torch.float32)
    error = relative_error(y, exact)
    assert error <= 12 * 2**-8, f"bfloat16 is off by {error:.3g}, allowed {12 * 2**-8:.3g}"


def assert_mixed_precision_is_near(subject: Subject, output: Callable[[nn.Module], Tensor]) -> None:
    """Float32 weights under autocast, as in training; gradients stay finite and in float32."""
    module = subject.build()
    with torch.autocast("cpu", torch.bfloat16):
        y = output(module)
    error = relative_error(y, output(module))
    assert error <= 12 * 2**-8, f"autocast is off by {error:.3g}, allowed {12 * 2**-8:.3g}"
    y.float().square().sum().backward()
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        assert gradient is None or gradient.isfinite().all(), (
            f"{name} gets a gradient that is not finite"
        )


def assert_close(got: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-5) -> None:
    assert_equal_within(got, wanted, what=what, tolerance=tolerance)
