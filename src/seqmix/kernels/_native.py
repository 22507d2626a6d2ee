"""The compiled kernels: which instruction set they were loaded for, or why there are none.

`SEQMIX_NATIVE=0` leaves them out; `SEQMIX_ISA=v3` takes those for another instruction set than the best one.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import torch

from seqmix.core.errors import ConfigError

REBUILD = "Install a C++ compiler and reinstall seqmix to have them."


def _load() -> tuple[ModuleType | None, str | None, str | None]:
    """The module, its instruction set, and the sentence that says why there is none."""
    if os.environ.get("SEQMIX_NATIVE", "1") == "0":
        return None, None, "SEQMIX_NATIVE=0 leaves the compiled kernels out"
    try:
        processor = importlib.import_module("seqmix.kernels._processor")
    except ModuleNotFoundError:
        warnings.warn(
            f"seqmix was installed without its compiled kernels and runs slower forms. {REBUILD}",
            stacklevel=2,
        )
        return None, None, "the compiled kernels were not built when seqmix was installed"
    usable: list[str] = processor.instruction_sets()
    wanted = os.environ.get("SEQMIX_ISA")
    if wanted is not None and wanted not in usable:
        raise ConfigError(
            f"SEQMIX_ISA={wanted!r}, wanted one that this processor has: {', '.join(usable)}. "
            "Unset it for the best."
        )
    for name in [wanted] if wanted else usable:
        try:
            return importlib.import_module(f"seqmix.kernels._native_{name}"), name, None
        except ModuleNotFoundError:
            continue
    return None, None, f"no kernels were built for this processor ({', '.join(usable)})"


_module, ISA, _reason = _load()
native: Any = _module


def missing(*inputs: Any, **options: Any) -> str | None:
    """Why the compiled kernels cannot run on these tensors, as one sentence; None if they can."""
    if _reason is not None:
        return _reason
    dtypes = set()
    for tensor in inputs:
        if isinstance(tensor, torch.Tensor):
            if tensor.device.type not in ("cpu", "meta"):
                return (
                    f"the compiled kernels run on the CPU, and the tensors are on {tensor.device}"
                )
            dtypes.add(tensor.dtype)
    if strange := dtypes - {torch.float32, torch.bfloat16}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in strange))
        return f"the compiled kernels take float32 and bfloat16, not {names}"
    return None
