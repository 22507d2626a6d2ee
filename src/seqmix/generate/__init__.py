"""Generation: text from a model."""

from seqmix.generate._method import Constraint
from seqmix.generate.beams import Beams
from seqmix.generate.constrained import Choice, JsonSchema, Language, Pattern
from seqmix.generate.contrastive import Contrastive
from seqmix.generate.diverse_beams import DiverseBeams
from seqmix.generate.few_shot import FewShot, answer_texts
from seqmix.generate.planning import Planning
from seqmix.generate.sampling import Sampling
from seqmix.generate.sandbox import Sandbox
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
    "FewShot",
    "JsonSchema",
    "Language",
    "Pattern",
    "Planning",
    "PromptLookup",
    "Sampling",
    "Sandbox",
    "Shape",
    "Speculative",
    "SpeculativeTree",
    "Text",
    "TreeLookup",
    "TreeModel",
    "answer_texts",
    "generate",
    "generate_texts",
]
