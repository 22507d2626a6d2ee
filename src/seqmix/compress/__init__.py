"""Ways to make a model cheaper: one file per method, which exports it as TRANSFORM."""

from seqmix.compress._recipe import parse_recipe, write_recipe
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.catalog import Catalog

TRANSFORMS = Catalog("seqmix.compress", "TRANSFORM")

__all__ = [
    "TRANSFORMS",
    "Calibration",
    "Needs",
    "Transform",
    "Work",
    "parse_recipe",
    "write_recipe",
]
