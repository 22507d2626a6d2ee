"""Distillation: a student learns from what a teacher thinks likely, beside what is true.

    loss = (1 - w) * CE(student, labels) + w * T^2 * KL(softmax(teacher / T) || softmax(student / T))

Hinton et al. 2015 (arXiv:1503.02531), section 2. Teacher and student may be built differently, as long as they score
the same target: so an encoder-decoder learns from a decoder (Elfeki et al. 2025, arXiv:2501.16273, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.errors import ConfigError, ShapeError
from seqmix.data.packing import IGNORED
from seqmix.objectives import Objective, target_logits


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    weight: float = 0.5,
) -> Tensor:
    """The mean over scored places, in nats, of logits [..., V] against labels [...]; -100 is not scored.

    Raises:
        ShapeError: for logits of different shapes. ConfigError: for a temperature that is not above 0, or a weight
        outside [0, 1].
    """
    if student.shape != teacher.shape:
        raise ShapeError(
            f"distillation_loss: `student` has shape {list(student.shape)} and `teacher` "
            f"{list(teacher.shape)}. Both must score the same tokens in the same vocabulary."
        )
    if temperature <= 0 or not 0 <= weight <= 1:
        raise ConfigError(
            f"distillation_loss: temperature={temperature}, weight={weight}, wanted more than 0 and 0 to 1."
        )
    scored = labels != IGNORED
    student, teacher, labels = student[scored].float(), teacher[scored].float(), labels[scored]
    true = F.cross_entropy(student, labels)
    soft = F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    return (1 - weight) * true + weight * temperature**2 * soft


class Distilled(Objective):
    """The targets of another objective, learned from `teacher` as well, which stays as it is.

    Teacher and student are any models that write: decoders or encoder-decoders with one vocabulary.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: Any,
        *,
        temperature: float = 2.0,
        weight: float = 0.5,
    ) -> None:
        super().__init__(objective.config)
        self.objective, self.teacher = objective, teacher.eval()
        self.temperature, self.weight = temperature, weight

    def inputs(self, ids: Tensor, generator: Generator) -> dict[str, Tensor]:
        return self.objective.inputs(ids, generator)

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            taught = target_logits(self.teacher, **inputs)
        return distillation_loss(
            target_logits(model, **inputs),
            taught,
            inputs["target"],
            temperature=self.temperature,
            weight=self.weight,
        )
