"""Which machine and which versions measured something."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import seqmix
from seqmix.kernels import ISA

PACKAGES = ("torch", "transformers", "accelerate", "optuna", "numpy")
IDENTITY = ("cpu", "cores", "threads", "memory_gb", "system")


def describe() -> dict[str, Any]:
    """The machine and the software, as plain values: what every record of a measurement carries."""
    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": ISA,
        "memory_gb": memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"seqmix": seqmix.__version__} | _versions(),
        "commit": _commit(),
    }


def identity(description: dict[str, Any]) -> dict[str, Any]:
    """The part of a description that has to agree for two speeds to be comparable."""
    return {name: description[name] for name in IDENTITY}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed measures nothing
    return found


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gb() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def _commit() -> str | None:
    """The commit of the source tree that runs; None for an installed package."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here: the version still says which release it is
    return done.stdout.strip() or None
