"""Real texts that no hub is needed for: one file per corpus, which exports it as CORPUS."""

from seqmix.core.catalog import Catalog
from seqmix.data.corpora._asset import CorpusAsset, DebianPackage, PythonPackage

CORPORA = Catalog("seqmix.data.corpora", "CORPUS")

__all__ = ["CORPORA", "CorpusAsset", "DebianPackage", "PythonPackage"]
