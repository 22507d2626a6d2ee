"""Training a frozen model to say several tokens ahead, from mask tokens at many places of every text.

    loss = mean_j [ CE(U z_j, x_{n+1+j}) + CE(sampler(z_j, x_{n+j}), x_{n+1+j}) + w mean_d (z_j - f_{n+j})^2 ]

z_j are the features of mask j behind x_1 ... x_n, and f_{n+j} those that the frozen model has where it predicts the
same token from all that come before: the last term draws the masks towards them (consistency).
Samragh et al. 2025 (arXiv:2507.11851), section 2.5; there the squares are summed over the width.

Axes: B rows, T time, P places, K masks, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from seqmix.core.errors import RangeError
from seqmix.core.state import State
from seqmix.models.multi_token import MultiTokenModel
from seqmix.objectives import Objective


class MultiToken(Objective):
    """For `train_objective(MultiTokenModel(model), windows, MultiToken())`.

    Args:
        every: tokens from one place with masks to the next.
        consistency: the weight w.
    """

    def __init__(self, *, every: int = 8, consistency: float = 1.0) -> None:
        super().__init__()
        if every < 1 or consistency < 0:
            raise RangeError(
                f"every={every}, consistency={consistency}, wanted at least 1 and at least 0."
            )
        self.every, self.consistency = every, consistency

    def inputs(self, ids: Tensor, generator: Generator) -> dict[str, Tensor]:
        return {"input_ids": ids}

    def loss(self, model: MultiTokenModel, inputs: dict[str, Tensor]) -> Tensor:
        """The mean over rows, places and masks, in nats; `RangeError` for texts without room for the masks."""
        ids, masks = inputs["input_ids"], len(model.masks)
        places = range(self.every, ids.shape[1] - masks, self.every)
        if not places:
            raise RangeError(
                f"multi-token: texts of {ids.shape[1]} tokens with every={self.every} and {masks} masks, wanted more "
                f"than {self.every + masks} tokens."
            )
        return self.ahead(model, ids, places, *self.read(model, ids, places))

    def ahead(
        self,
        model: MultiTokenModel,
        ids: Tensor,
        places: range,
        features: Tensor,
        states: list[State],
    ) -> Tensor:
        """The loss at masks after so many tokens of texts [B, T], whose `features` [B, T, D] and states are given."""
        masks = len(model.masks)
        z = torch.stack([model.read_masks(state, len(ids)) for state in states], dim=1)
        targets, before = (_windows(ids, places, shift, masks) for shift in (1, 0))
        anchors = _windows(features, places, 0, masks)
        direct, sampled = model.base.model.logits(z), model.logits(z, before)
        wanted = targets.flatten()
        return (
            F.cross_entropy(direct.flatten(0, 2), wanted)
            + F.cross_entropy(sampled.flatten(0, 2), wanted)
            + self.consistency * F.mse_loss(z, anchors)
        )

    def read(
        self, model: MultiTokenModel, ids: Tensor, places: range
    ) -> tuple[Tensor, list[State]]:
        """Features [B, T, D] of texts [B, T], and the states after so many of their tokens."""
        features, states, state, done = [], [], None, 0
        for place in [*places, ids.shape[1]]:
            part, state = self.read_tokens(
                model, model.base.model.embedding(ids[:, done:place]), state
            )
            features.append(part)
            states.append(state)
            done = place
        return torch.cat(features, dim=1), states[:-1]

    @torch.no_grad()
    def read_tokens(self, model: MultiTokenModel, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Features of embedded tokens of the text, and the state after them: the frozen model's."""
        features, state = model.base.model.backbone(x, state)
        return features, state


def _windows(x: Tensor, places: range, shift: int, length: int) -> Tensor:
    """The `length` entries of x [B, T, ...] from every place on, `shift` further, [B, P, length, ...]."""
    return torch.stack([x[:, p + shift : p + shift + length] for p in places], dim=1)
