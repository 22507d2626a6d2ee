"""Chimera: a drafter of two layers that knows what the frozen model has read.

    t_i = W_2 silu(W_1 [E x_{i-2}, E x_{i-1}, E x_i])                     the trigram layer
    q_i = t_i + A_d f_m,   g_i = f_m + q_i + attention(q_i; f_1 ... f_m)   the full-context layer

f_1 ... f_m are the features of the tokens that the model has read, x_i is a guess d = i - m tokens further, and the
model's own embedding E and head turn tokens into vectors and g_i into logits of the token after x_i. Short dependencies
come from the tokens, guesses included, and long ones from the model. A_d, one matrix for every distance, are the
decoding heads. Zeng et al. 2024 (arXiv:2402.15758); there the layer over the context is a whole block of a transformer.

Axes: B rows, T time, Q queries, V vocabulary, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from seqmix.core.errors import RangeError
from seqmix.generate._method import Task
from seqmix.generate.speculative_tree import Guesses, Shape, TreeDraft, TreeDrafter, grow
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.objectives import Objective
from seqmix.ops.attention import attention
from seqmix.train.objective import train_objective
from seqmix.train.plan import Record

TRIGRAM = 3


class Chimera(nn.Module):
    """The two layers for a model, which is left as it is; guesses up to `depth` tokens further than it has read."""

    def __init__(self, base: SeqmixForCausalLM, *, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        width = base.model.spec.width
        if depth < 1 or width % heads:
            raise RangeError(
                f"depth={depth}, heads={heads}, wanted a depth of at least 1 and heads that divide width={width}."
            )
        self.depth, self.heads = depth, heads
        self.known = [base]  # in a list, so that its weights are none of this module
        self.near = nn.Sequential(
            nn.Linear(TRIGRAM * width, width // 2, bias=False),
            nn.SiLU(),
            nn.Linear(width // 2, width, bias=False),
        )
        self.anchors = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        for layer in (self.near[-1], *self.anchors, self.output):
            nn.init.zeros_(
                layer.weight
            )  # at first it guesses what the model would, a few tokens late

    def trigrams(self, ids: Tensor) -> Tensor:
        """t [B, Q, D] of the last three tokens [B, Q, 3], the newest one last."""
        return self.near(self.known[0].model.embedding(ids).flatten(-2))

    def remember(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, H, K] of what the model has read, features [B, T, D]."""
        heads = (self.heads, -1)
        return self.key(features).unflatten(-1, heads), self.value(features).unflatten(-1, heads)

    def ahead(
        self, near: Tensor, anchor: Tensor, keys: Tensor, values: Tensor, distance: int
    ) -> Tensor:
        """Logits [B, Q, V] after guesses with t `near [B, Q, D]`, which are `distance` behind `anchor [B, Q, D]`.

        Queries are aligned with the end of the keys [B, T, H, K]: the last one sees all, the one before it all but one.
        """
        q = near + self.anchors[distance - 1](anchor)
        read = attention(self.query(q).unflatten(-1, (self.heads, -1)), keys, values)
        g = anchor + q + self.output(read.flatten(-2))
        logits: Tensor = self.known[0].model.logits(g)
        return logits


class _Distillation(Objective):
    """Cross-entropy with the model's own next token distribution, at every distance; windows are numbers of rows."""

    def __init__(self, ids: Tensor, features: Tensor) -> None:
        super().__init__()
        self.rows, self.features = ids, features

    def inputs(self, ids: Tensor, generator: Generator) -> dict[str, Tensor]:
        rows = ids.flatten()
        return {"ids": self.rows[rows], "features": self.features[rows]}

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        ids, features = inputs["ids"], inputs["features"]
        length = ids.shape[1]
        with torch.no_grad():
            wanted = model.known[0].model.logits(features).softmax(-1)
        near = model.trigrams(ids.unfold(1, TRIGRAM, 1))  # from the third token on
        keys, values = model.remember(features)
        losses = []
        for distance in range(1, model.depth + 1):
            first, seen = max(distance, TRIGRAM - 1), length - distance
            logits = model.ahead(
                near[:, first - TRIGRAM + 1 :],
                features[:, first - distance : seen],
                keys[:, :seen],
                values[:, :seen],
                distance,
            )
            losses.append(F.cross_entropy(logits.flatten(0, 1), wanted[:, first:].flatten(0, 1)))
        return torch.stack(losses).mean()


def train_chimera(drafter: Chimera, windows: Tensor, *, steps: int, **training: Any) -> Record:
    """Trains the drafter on windows [N, T] of token ids, of which the frozen model reads each once.

    The other arguments are those of `seqmix.train.objective.train_objective`.
    """
    model = drafter.known[0].model
    with torch.no_grad():
        parts = [
            model.backbone(model.embedding(part))[0]
            for part in windows.split(training.get("batch", 16))
        ]
    objective = _Distillation(windows, torch.cat(parts))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        return train_objective(
            drafter,  # type: ignore[arg-type]
            torch.arange(len(windows)).unsqueeze(1),
            objective,
            steps=steps,
            **training,
        )
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class ChimeraTree(TreeDrafter):
    """The likeliest continuations under a trained `Chimera`."""

    def __init__(self, drafter: Chimera, shape: Shape | None = None) -> None:
        self.drafter = drafter
        self.shape = shape or Shape(depth=drafter.depth)
        if self.shape.depth > drafter.depth:
            raise RangeError(
                f"shape.depth={self.shape.depth}, and the drafter is trained for {drafter.depth}. Give it as depth "
                "of the drafter before training."
            )

    def start(self, task: Task) -> TreeDraft:
        return _ChimeraDraft(self.drafter, self.shape, task.prompt[0].tolist())


class _ChimeraDraft(TreeDraft):
    def __init__(self, drafter: Chimera, shape: Shape, prompt: list[int]) -> None:
        self.drafter, self.shape = drafter, shape
        self.prompt = prompt[:1] * (TRIGRAM - 1) + prompt  # there are three tokens at any time
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def guess(self, written: list[int], features: Tensor) -> Guesses:
        anchor = features[None, -1:]
        keys, values = self.drafter.remember(features.unsqueeze(0))
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=1)
            values = torch.cat([self.values, values], dim=1)
        self.keys, self.values = keys, values
        level = [(self.prompt + written)[-TRIGRAM:]]
        distance = 0

        def logits() -> Tensor:
            nonlocal distance
            distance += 1
            rows = len(level)
            near = self.drafter.trigrams(torch.tensor(level, device=features.device).unsqueeze(1))
            known, held, read = (x.expand(rows, *x.shape[1:]) for x in (anchor, keys, values))
            return self.drafter.ahead(near, known, held, read, distance)[:, -1]

        def extend(rows: list[int], tokens: list[int]) -> Tensor:
            nonlocal level
            level = [[*level[row][1:], token] for row, token in zip(rows, tokens, strict=True)]
            return logits()

        return grow(self.shape, logits(), extend)
