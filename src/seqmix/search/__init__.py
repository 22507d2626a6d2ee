"""Making a pretrained model cheaper, as a whole: recipes, budgets, what they take and what they give."""

from seqmix.search.compress import Compressed, compress, convert

__all__ = ["Compressed", "compress", "convert"]
