"""Compiled kernels: what there is on this machine, and the functions on tensors that call it."""

from seqmix.kernels._native import ISA, describe, missing, transformed

__all__ = ["ISA", "describe", "missing", "transformed"]
