"""The compiled kernels: which instruction set they were loaded for, or why there are none.

`SEQMIX_NATIVE=0` leaves them out and `SEQMIX_NATIVE=1` insists on them; without it their absence is a warning.
`SEQMIX_ISA=v3` takes those for another instruction set than the best one.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from seqmix.core.errors import ConfigError

NOT_BUILT = "the compiled kernels were not built when seqmix was installed"
REMEDY = "Install a C++ compiler and install seqmix again to have them; SEQMIX_NATIVE=0 does without and is quiet."
TAKEN = (torch.float32, torch.bfloat16)
_PREFIX = "_native_"
_RUNTIMES = ("libgomp", "libomp", "libiomp")


def built() -> list[str]:
    """The instruction sets that there are kernels for in this installation."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return sorted(name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))


def usable() -> list[str]:
    """The instruction sets that this processor has and we know, the best first; none without a build."""
    try:
        processor = importlib.import_module("seqmix.kernels._processor")
    except ModuleNotFoundError:
        return []
    names: list[str] = processor.instruction_sets()
    return names


def _load() -> tuple[ModuleType | None, str | None, str | None]:
    """The module, its instruction set, and the sentence that says why there is none."""
    switch, wanted = os.environ.get("SEQMIX_NATIVE"), os.environ.get("SEQMIX_ISA")
    if switch not in (None, "0", "1"):
        raise ConfigError(f"SEQMIX_NATIVE={switch!r}, wanted 0 or 1. Unset it for the default.")
    if switch == "0":
        return None, None, "SEQMIX_NATIVE=0 leaves the compiled kernels out"
    here = [name for name in usable() if name in built()]
    if wanted is not None and wanted not in here:
        raise ConfigError(
            f"SEQMIX_ISA={wanted!r}, wanted one that is built here and that this processor has: "
            f"{', '.join(here) or 'none'}. Unset it for the best."
        )
    if here:
        name = wanted or here[0]
        return importlib.import_module(f"seqmix.kernels.{_PREFIX}{name}"), name, None
    reason = NOT_BUILT
    if built():
        reason = f"the compiled kernels are for {', '.join(built())}, which this processor has not"
    if switch == "1":
        raise ConfigError(f"SEQMIX_NATIVE=1, but {reason}. {REMEDY}")
    warnings.warn(f"seqmix runs slower forms: {reason}. {REMEDY}", stacklevel=2)
    return None, None, reason


_module, ISA, _reason = _load()
native: Any = _module


def missing(*inputs: Any, **options: Any) -> str | None:
    """Why the compiled kernels cannot run on these tensors, as one sentence; None if they can."""
    if _reason is not None:
        return _reason
    if transformed():
        return (
            "the compiled kernels know neither the transforms of torch.func nor forward derivatives"
        )
    for tensor in inputs:
        if isinstance(tensor, torch.Tensor):
            if tensor.dtype not in TAKEN:
                name = str(tensor.dtype).removeprefix("torch.")
                return f"the compiled kernels take float32 and bfloat16, not {name}"
            if not (tensor.is_cpu or tensor.is_meta):
                return (
                    f"the compiled kernels run on the CPU, and the tensors are on {tensor.device}"
                )
    return None


def transformed() -> bool:
    """Whether a transform of torch.func or a level of forward derivatives is active, which kernels would pass over."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def describe() -> dict[str, Any]:
    """What `seqmix doctor` says of the kernels."""
    have, can = built(), usable()
    processor = importlib.import_module("seqmix.kernels._processor") if can else None
    runtimes = loaded_runtimes()
    return {
        "in use": ISA,
        "why": _reason or _why_this_one(can, have),
        "built for": have,
        "the processor has": can,
        "compiler": processor and processor.compiler,
        "sanitizers": (processor and processor.sanitizers) or None,
        "threads": torch.get_num_threads(),
        "OpenMP": runtimes,
        "OpenMP is PyTorch's": None if ISA is None or not runtimes else len(runtimes) == 1,
        "get": None if set(have) & set(can) else REMEDY,
    }


def _why_this_one(can: list[str], have: list[str]) -> str:
    if "SEQMIX_ISA" in os.environ:
        return f"SEQMIX_ISA={ISA}"
    better = [name for name in can[: can.index(str(ISA))] if name not in have]
    return "the best that this processor has" + (
        f", of those that are built ({', '.join(better)} are not)" if better else ""
    )


def loaded_runtimes() -> list[str]:
    """The OpenMP libraries in this process, where the system tells. More than one would each have its threads."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return sorted(file for file in files if Path(file).name.startswith(_RUNTIMES))
