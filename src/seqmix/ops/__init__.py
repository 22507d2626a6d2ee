"""Operators: one file per recurrence or structured matrix, one public function per file.

`seqmix.ops.NAME(...)` is the function of `seqmix/ops/NAME.py`; `OPERATORS.get(NAME)` is its description
(definition, forms, sample inputs, cost). Axes everywhere: B batch, T time, H heads, K key width, V value
width, E channels, N state width.
"""

import importlib

from seqmix.core.catalog import Catalog
from seqmix.ops._operator import Case, Form, Operator, record_forms

OPERATORS = Catalog("seqmix.ops", "OPERATOR")

# Importing a submodule sets the package's attribute to the module; the public name is the function.
for _name in OPERATORS:
    globals()[_name] = getattr(importlib.import_module(f"seqmix.ops.{_name}"), _name)

__all__ = ["OPERATORS", "Case", "Form", "Operator", "record_forms", *OPERATORS.names()]
