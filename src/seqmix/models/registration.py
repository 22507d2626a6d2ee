"""Makes transformers know seqmix models, without importing transformers."""

from __future__ import annotations

import importlib
import warnings

from seqmix.core.lazy import when_imported


def register_with_transformers() -> None:
    """From now on importing transformers also registers `seqmix` models with its Auto classes."""
    when_imported("transformers", _import_models)


def _import_models() -> None:
    try:
        for kind in ("hf", "encoder", "seq2seq"):
            importlib.import_module(f"seqmix.models.{kind}")
    except ImportError as error:  # an old transformers must stay usable beside seqmix
        warnings.warn(
            f"transformers cannot load seqmix models here ({error}): pip install 'seqmix[train]'",
            stacklevel=2,
        )
