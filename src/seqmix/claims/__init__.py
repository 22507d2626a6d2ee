"""Claims of papers as executable statements: one file per paper, named after its catalogue id."""

from seqmix.claims._claim import Claim, Finding, Run, compare_groups, reproduce
from seqmix.core.catalog import Catalog

CLAIMS = Catalog("seqmix.claims", "CLAIM")

__all__ = ["CLAIMS", "Claim", "Finding", "Run", "compare_groups", "reproduce"]
