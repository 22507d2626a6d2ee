"""Recover: a cheaper model is trained on, a little, so that what it has left makes up for what it has lost.

    loss = (1 - w) CE(student, next token) + w KL(teacher || student)

The teacher is the model before all steps, where the text comes with one. With `lora` a low rank is learnt beside every
dense layer and then added to its weights, so that the model keeps its size (Hu et al. 2021, arXiv:2106.09685).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.compress._activations import linear_layers
from seqmix.compress._training import trained
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.convert.linearize import in_turns
from seqmix.core.errors import ConfigError
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.train.distillation import distillation_loss
from seqmix.train.folder import RunFolder
from seqmix.train.loop import run
from seqmix.train.parameters import merged, select_parameters
from seqmix.train.plan import Plan, Record

PARAMETERS = ("lora", "all", "last", "head")


@dataclass(frozen=True, kw_only=True)
class Recover(Transform):
    quick: ClassVar = {"tokens": 128}

    tokens: int = 65536  # trained on; passes over the text where it has fewer
    parameters: str = "lora"  # or all, last, head: see `seqmix.train.parameters`
    distillation: float | None = None  # w; by default a half with a teacher, 0 without
    learning_rate: float = 5e-4
    batch: int = 1  # windows per step

    def __post_init__(self) -> None:
        if self.parameters not in PARAMETERS:
            raise ConfigError(
                f"recover: parameters={self.parameters!r}, wanted one of {', '.join(PARAMETERS)}."
            )
        if min(self.tokens, self.batch) < 1 or self.learning_rate <= 0:
            raise ConfigError(
                f"recover: tokens={self.tokens}, batch={self.batch}, learning_rate={self.learning_rate}, wanted at "
                "least 1 token and window, and a rate above 0."
            )
        if self.distillation is not None and not 0 <= self.distillation <= 1:
            raise ConfigError(f"recover: distillation={self.distillation}, wanted 0 to 1.")

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        self._check(model)
        weight = self._weight(data)
        windows = data.with_at_least(self.tokens).to(model.device)
        plan = Plan(
            steps=math.ceil(self.tokens / (self.batch * windows.shape[1])),
            tokens_per_step=self.batch * windows.shape[1],
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            progress=work.shown,
        )

        def loss(student: Any, inputs: dict[str, Tensor]) -> Tensor:
            ids = inputs["input_ids"]
            logits, labels = student(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]
            if not weight:
                return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            assert data.teacher is not None
            with torch.no_grad():
                taught = data.teacher(input_ids=ids, use_cache=False).logits[:, :-1]
            return distillation_loss(logits, taught, labels, temperature=1.0, weight=weight)

        def train(
            given: SeqmixForCausalLM, folder: RunFolder | None
        ) -> tuple[SeqmixForCausalLM, Record]:
            made = copy.deepcopy(given)
            learning = {name: p.requires_grad for name, p in made.named_parameters()}
            student = select_parameters(made, self.parameters)
            record = run(
                student, in_turns(windows, self.batch, seed=0), plan, folder=folder, loss=loss
            )
            made = merged(student)
            for name, parameter in made.named_parameters():
                parameter.requires_grad_(learning[name])
            return made, record

        options = {**self.to_dict(), "distillation": weight}
        made, used = trained("recover", model, data, work, options, train)
        work.notes |= {**used, "distillation": weight, "parameters": self.parameters}
        return made

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        weights = model.num_parameters()
        learnt = weights if self.parameters == "all" else weights // 10
        return Needs(
            forward_tokens=self.tokens if self._weight(data) else 0,
            training_tokens=self.tokens,
            memory_mb=4 * (weights + 3 * learnt) / 2**20,
        )

    def _weight(self, data: Calibration) -> float:
        if self.distillation is None:
            return 0.0 if data.teacher is None else 0.5
        if self.distillation and data.teacher is None:
            raise ConfigError(
                f"recover: distillation={self.distillation} needs a teacher, and the text comes with none. Give "
                "Calibration(teacher=...), or leave out distillation."
            )
        return self.distillation

    def _check(self, model: SeqmixForCausalLM) -> None:
        if self.parameters == "lora" and not any(linear_layers(model.model.backbone)):
            raise ConfigError(
                "recover: parameters='lora' finds no dense layer to stand beside. Choose parameters=all."
            )


TRANSFORM = Recover
