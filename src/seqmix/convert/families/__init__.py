"""Families of pretrained models: one file per family, which exports it as FAMILY."""

from seqmix.convert.families._family import Family, Weights
from seqmix.core.catalog import Catalog

FAMILIES = Catalog("seqmix.convert.families", "FAMILY")

__all__ = ["FAMILIES", "Family", "Weights"]
