"""Layers that take the place of a dense one: one file per way to keep a weight, which exports it as LINEAR."""

from seqmix.core.catalog import Catalog
from seqmix.linears._linear import Replacement, linear_cost, replace_layer, replace_layers

LINEARS = Catalog("seqmix.linears", "LINEAR")

__all__ = ["LINEARS", "Replacement", "linear_cost", "replace_layer", "replace_layers"]
