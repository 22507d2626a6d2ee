"""Training objectives: one file per objective, which exports it as OBJECTIVE."""

from seqmix.core.catalog import Catalog
from seqmix.objectives._objective import (
    Objective,
    ObjectiveConfig,
    TargetObjective,
    target_logits,
)

OBJECTIVES = Catalog("seqmix.objectives", "OBJECTIVE")

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig", "TargetObjective", "target_logits"]
