"""Early exits: what shallow blocks know of the next token, and how sure they are.

After some depths l an exit reads what block l wrote, h_t, and gives features and a confidence,

    f_t = norm(e(h_t)),   c_t = sigmoid(w . f_t + b),

with e one block of any layout (`mamba/none`, a recurrence over the hidden states; `none/mlp`, each token alone). The
model's own head turns f_t into logits; c_t estimates how likely their largest is the whole model's.
Nogales et al. 2025, DYNAMAX (arXiv:2504.20922): exits in Mamba and Transformers, and Mamba as what decides about them.

Axes: N rows, T time, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn

from seqmix.core.errors import RangeError
from seqmix.core.state import State
from seqmix.models.backbone import Backbone, LanguageModel, build_norm
from seqmix.models.hf import SeqmixForCausalLM


class Exit(nn.Module):
    """h [N, T, D] and the state of its block, to features [N, T, D], confidences in logits [N, T] and the state after.

    Its norm starts as the model's last one, and its block, as every new block, writes little at first.
    """

    def __init__(self, model: LanguageModel, layout: str) -> None:
        super().__init__()
        spec = dataclasses.replace(model.spec, layout=layout, depth=None, replaced={})
        self.block = Backbone(spec).blocks[0]
        self.norm = build_norm(spec)
        if model.backbone.norm is not None:
            self.norm.load_state_dict(model.backbone.norm.state_dict())
        self.confidence = nn.Linear(spec.width, 1)

    def forward(self, h: Tensor, state: State = None) -> tuple[Tensor, Tensor, State]:
        h, state = self.block(h, state)
        features = self.norm(h)
        return features, self.confidence(features).squeeze(-1), state


class EarlyExits(nn.Module):
    """Exits of one model after blocks number `depths`; the model is left as it is.

    Raises `RangeError` for depths that the model does not have.
    """

    def __init__(
        self, model: SeqmixForCausalLM, depths: Sequence[int], layout: str = "mamba/none"
    ) -> None:
        super().__init__()
        inside, last = model.model, len(model.model.backbone.blocks)
        if list(depths) != sorted(set(depths)) or not all(0 < depth < last for depth in depths):
            raise RangeError(
                f"depths={list(depths)}, wanted growing numbers of blocks from 1 to {last - 1}, after which to exit."
            )
        self.known = [model]  # in a list, so that its weights are none of this module
        self.depths = tuple(depths)
        self.exits = nn.ModuleList(Exit(inside, layout) for _ in depths)

    def hidden(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the blocks before each exit write for ids [N, T], and the whole model's features."""
        inside = self.known[0].model
        backbone = inside.backbone
        x, _ = backbone.enter(inside.embedding(ids))
        found = []
        for depth, block in enumerate(backbone.blocks):
            if depth in self.depths:
                found.append(x)
            x, _ = block(x)
        return found, backbone.leave(x)
