"""Two of four: two of every four neighbouring weights go, the others get few bits, and training makes up for it.

    1. the mask keeps the two largest of every four weights, or of four pairs of them with `unit=2`;
    2. `steps` of training with the masked weights, then as many with masked and rounded ones (gradients pass straight
       through both), each on   KL(teacher || student) + mean ||f_teacher - f_student||^2 / mean ||f_teacher||^2

The first teacher is the given model, the second the model with the masked weights; f are the outputs of the last block.
The embedding and the head, which are no layers of the blocks, get 8 bits by `int8` as a further step of a recipe.
Yu et al. 2023 (GPUSQ-ViT, arXiv:2305.10727), section 3: structured pruning, then quantisation-aware training, both with
distillation. They round activations too; here only weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from seqmix.compress._activations import linear_layers
from seqmix.compress._quantizers import best_step, to_steps
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.linears import Replacement
from seqmix.linears.two_four import GROUP, KEPT, TwoFour, check, two_largest
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.rebuild import replaced


@dataclass(frozen=True, kw_only=True)
class ToTwoFour(Transform):
    quick: ClassVar = {"steps": 1, "batch": 2}

    steps: int = 50  # of each of the two parts; 0 trains nothing
    learning_rate: float = 3e-4
    batch: int = 4  # windows of a step
    seed: int = 0
    bits: int = 8  # of what is kept: 8 or 4
    unit: int = 1  # neighbouring weights that stay or go together: 1 or 2

    def __post_init__(self) -> None:
        check(self.bits, self.unit)
        if self.steps < 0 or self.batch < 1:
            raise ConfigError(
                f"two_four: steps={self.steps}, batch={self.batch}, wanted at least 0 and 1."
            )

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        made = copy.deepcopy(model).eval()
        layers = {
            f"backbone.{place}": layer
            for place, layer in linear_layers(made.model.backbone)
            if layer.in_features % (GROUP * KEPT * self.unit) == 0
        }
        if not layers:
            raise ConfigError(
                f"two_four: no dense linear layer with a multiple of {GROUP * KEPT * self.unit} inputs is left. "
                "Leave out this step."
            )
        masks = {p: two_largest(layer.weight.detach(), self.unit) for p, layer in layers.items()}
        for place, layer in layers.items():
            parametrize.register_parametrization(layer, "weight", Masked(masks[place], self.bits))
        losses = self.train(made, model, data.windows.to(model.device), work)
        found: dict[str, Replacement] = {}
        for place, layer in layers.items():
            parametrize.remove_parametrizations(layer, "weight")
            codes, scale = rounded(layer.weight.detach(), self.bits)
            found[place] = TwoFour.of(
                layer, masks[place], codes, scale, bits=self.bits, unit=self.unit
            )
        work.notes["layers"] = len(found)
        work.notes["losses"] = losses[:: max(1, len(losses) // 10)]
        return replaced(made, found).train(model.training)

    def train(
        self, student: SeqmixForCausalLM, teacher: SeqmixForCausalLM, windows: Tensor, work: Work
    ) -> list[float]:
        """Trains all weights of `student`; the losses of the steps."""
        optimizer = torch.optim.AdamW(student.parameters(), lr=self.learning_rate, weight_decay=0.0)
        random = torch.Generator().manual_seed(self.seed)
        losses = []
        for step in work.track(range(2 * self.steps), "training"):
            if step == self.steps:
                teacher = copy.deepcopy(student)
                for module in student.modules():
                    if isinstance(module, Masked):
                        module.rounds = True
            rows = torch.randint(len(windows), (self.batch,), generator=random)
            with torch.enable_grad():
                loss = distance(student, teacher, windows[rows.to(windows.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        tokens = 2 * self.steps * self.batch * data.windows.shape[1]
        weights = sum(p.numel() for p in model.parameters())
        return Needs(forward_tokens=tokens, training_tokens=tokens, memory_mb=16 * weights / 2**20)


class Masked(nn.Module):
    """W * mask, rounded to so many bits once `rounds` is set; the gradient is that of W * mask."""

    def __init__(self, mask: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("mask", mask, persistent=False)
        self.rounds = False

    def forward(self, weight: Tensor) -> Tensor:
        kept = weight * self.mask
        if not self.rounds:
            return kept
        codes, scale = rounded(kept.detach(), self.bits)
        return kept + (codes * scale.unsqueeze(1) - kept).detach()


def rounded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers [O, I] in int8, and the step of each row [O] that has the least squared error."""
    weight = weight.float()
    step = best_step(weight, bits, dim=1)
    return (to_steps(weight, step, bits) / step).round().to(torch.int8), step.flatten()


def distance(student: SeqmixForCausalLM, teacher: SeqmixForCausalLM, ids: Tensor) -> Tensor:
    """How far the student's predictions and last features are from the teacher's."""
    with torch.no_grad():
        wanted, features = _seen(teacher, ids)
    got, own = _seen(student, ids)
    soft = F.kl_div(
        got.log_softmax(-1).flatten(0, 1),
        wanted.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    return soft + (own - features).square().mean() / features.square().mean().clamp_min(1e-30)


def _seen(model: SeqmixForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and what the last block gives."""
    kept: list[Tensor] = []
    blocks = model.model.backbone.blocks
    handle = blocks[-1].register_forward_hook(lambda module, given, result: kept.append(result[0]))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits, kept[0]


TRANSFORM = ToTwoFour
