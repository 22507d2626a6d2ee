"""Token mixers: one file per mixer, which exports it as MIXER. Adding a file here is all it takes."""

from seqmix.core.catalog import Catalog
from seqmix.mixers._mixer import Mixer, MixerConfig

MIXERS = Catalog("seqmix.mixers", "MIXER")

__all__ = ["MIXERS", "Mixer", "MixerConfig"]
