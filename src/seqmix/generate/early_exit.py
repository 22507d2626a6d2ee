"""Early exits: a token that shallow blocks are sure of does not go through the deep ones.

After some depths l an exit reads what block l wrote, h_t, and gives features and a confidence,

    f_t = norm(e(h_t)),   c_t = sigmoid(w . f_t + b),

with e one block of any layout (`mamba/none`, a recurrence over the hidden states; `none/mlp`, each token alone). The
model's own head turns f_t into logits; c_t estimates how likely their largest is the whole model's. The token takes the
first exit with c_t of at least `threshold`.

Nogales et al. 2025, DYNAMAX (arXiv:2504.20922): exits in Mamba and Transformers, and Mamba as what decides about them.
Deep blocks that read skipped tokens later, all at once: Bae et al. 2023 (arXiv:2310.05424), section 4.1.

Axes: N rows, T time, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, cat, nn

from seqmix.core.errors import RangeError
from seqmix.core.state import State, select_rows
from seqmix.generate._reader import Reader, Reading
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
    """Exits of one model after blocks number `depths`, which are trained by `fit_exits` while the model stays."""

    def __init__(
        self, model: SeqmixForCausalLM, depths: Sequence[int], layout: str = "mamba/none"
    ) -> None:
        super().__init__()
        inside, last = model.model, len(model.model.backbone.blocks)
        if list(depths) != sorted(set(depths)) or not all(0 < depth < last for depth in depths):
            raise RangeError(
                f"depths={list(depths)}, wanted growing numbers of blocks from 1 to {last - 1}, after which to exit."
            )
        self.depths = tuple(depths)
        self.exits = nn.ModuleList(Exit(inside, layout) for _ in depths)

    def hidden(self, model: SeqmixForCausalLM, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the blocks before each exit write for ids [N, T], and the whole model's features."""
        backbone = model.model.backbone
        x, _ = backbone.enter(model.model.embedding(ids))
        found = []
        for depth, block in enumerate(backbone.blocks):
            if depth in self.depths:
                found.append(x)
            x, _ = block(x)
        return found, backbone.leave(x)

    def loss(self, model: SeqmixForCausalLM, ids: Tensor) -> Tensor:
        """Summed over exits: KL(model || exit) in nats, and the cross-entropy of c with whether both agree."""
        with torch.no_grad():
            hidden, features = self.hidden(model, ids)
            wanted = model.model.logits(features).float().log_softmax(-1)
        total = torch.zeros((), device=ids.device)
        for each, h in zip(self.exits, hidden, strict=True):
            features, confidence, _ = each(h)
            logs = model.model.logits(features).float().log_softmax(-1)
            same = (logs.argmax(-1) == wanted.argmax(-1)).float()
            total = total + F.kl_div(logs, wanted, log_target=True, reduction="none").sum(-1).mean()
            total = total + F.binary_cross_entropy_with_logits(confidence.float(), same)
        return total


def fit_exits(
    model: SeqmixForCausalLM,
    batches: Iterable[Tensor],
    *,
    depths: Sequence[int],
    layout: str = "mamba/none",
    learning_rate: float = 3e-3,
    seed: int = 0,
    observe: Callable[[float], object] | None = None,
) -> EarlyExits:
    """Exits trained by AdamW on batches of ids [N, T], with a rate that falls to zero; the model is not changed.

    `observe` is called with the loss of every step. Raises `RangeError` for depths that the model does not have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        exits = EarlyExits(model, depths, layout).to(model.device)
    optimizer = torch.optim.AdamW(exits.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    known = list(batches)
    for step, ids in enumerate(known):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / len(known))
        loss = exits.loss(model, ids.to(model.device))
        optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=list(exits.parameters()))
        nn.utils.clip_grad_norm_(exits.parameters(), 1.0)
        optimizer.step()
        if observe is not None:
            observe(float(loss.detach()))
    return exits.eval()


@dataclass
class Tally:
    """What single tokens cost: how many were read, blocks that read one of them, and calls of blocks."""

    tokens: int = 0
    blocks: int = 0
    calls: int = 0


@dataclass(frozen=True)
class _Progress:
    """The state of a text: of positions, of every block and exit, and what each stretch of blocks has not read yet."""

    positions: State
    blocks: list[State]
    exits: list[State]
    unread: list[Tensor | None]  # [N, T, D], before the blocks after each exit


class EarlyExitReader(Reader):
    """Reads prompts with the whole model, and each further token as deep as `threshold` asks; above 1, to the end.

    Every way of decoding can be given it in the place of a model. Rows go together, as deep as the least certain. With
    `catch_up` deep blocks read the tokens that they missed as soon as one comes to them, so that all states are what
    they would be without exits; without it they never see them. `tally` counts.
    """

    def __init__(
        self,
        model: SeqmixForCausalLM,
        exits: EarlyExits,
        *,
        threshold: float,
        catch_up: bool = True,
    ) -> None:
        self.model = model.eval()
        self.inside = model.model
        self.exits = exits.eval()
        self.threshold = threshold
        self.catch_up = catch_up
        self.tally = Tally()
        ends = [*exits.depths, len(self.inside.backbone.blocks)]
        self.stretches = list(zip([0, *exits.depths], ends, strict=True))

    def read(self, ids: Tensor, state: State = None, *, keep: int = 1) -> Reading:
        backbone = self.inside.backbone
        before = state or _Progress(
            None,
            [None] * len(backbone.blocks),
            [None] * len(self.exits.depths),
            [None] * len(self.stretches),
        )
        blocks, exits, unread = list(before.blocks), list(before.exits), list(before.unread)
        is_single = state is not None and ids.shape[1] == 1
        x, positions = backbone.enter(self.inside.embedding(ids), before.positions)
        features = x
        for number, (start, end) in enumerate(self.stretches):
            if (missed := unread[number]) is not None:
                x, unread[number] = cat([missed, x], dim=1), None
            for depth in range(start, end):
                x, blocks[depth] = backbone.blocks[depth](x, blocks[depth])
            if is_single:
                self.tally.blocks += (end - start) * x.shape[1]
                self.tally.calls += end - start
            if end == len(backbone.blocks):
                features = backbone.leave(x[:, -ids.shape[1] :])
                break
            # An exit reads every token once, when its own stretch has: those before it are in its state already.
            features, confidence, exits[number] = self.exits.exits[number](x, exits[number])
            if is_single and bool((confidence[:, -1].sigmoid() >= self.threshold).all()):
                if self.catch_up:
                    later = unread[number + 1]
                    unread[number + 1] = x if later is None else cat([later, x], dim=1)
                break
        self.tally.tokens += is_single
        features = features[:, -ids.shape[1] :]
        after = _Progress(positions, blocks, exits, unread)
        return Reading(self.inside.logits(features[:, -keep:]), features, after)

    def select(self, state: State, rows: list[int]) -> State:
        parts = (state.positions, state.blocks, state.exits, state.unread)
        return _Progress(*(select_rows(part, rows) for part in parts))
