"""Generation: text from a model."""

from seqmix.generate.text import generate

__all__ = ["generate"]
