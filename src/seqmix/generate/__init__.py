"""Generation: text from a model."""

from seqmix.generate._method import Constraint
from seqmix.generate.beams import Beams
from seqmix.generate.constrained import Choice, JsonSchema, Language, Pattern
from seqmix.generate.contrastive import Contrastive
from seqmix.generate.diverse_beams import DiverseBeams
from seqmix.generate.sampling import Sampling
from seqmix.generate.speculative import DraftModel, PromptLookup, Speculative
from seqmix.generate.speculative_tree import Shape, SpeculativeTree, TreeLookup, TreeModel
from seqmix.generate.text import Text, generate, generate_texts

__all__ = [
    "Beams",
    "Choice",
    "Constraint",
    "Contrastive",
    "DiverseBeams",
    "DraftModel",
    "JsonSchema",
    "Language",
    "Pattern",
    "PromptLookup",
    "Sampling",
    "Shape",
    "Speculative",
    "SpeculativeTree",
    "Text",
    "TreeLookup",
    "TreeModel",
    "generate",
    "generate_texts",
]
