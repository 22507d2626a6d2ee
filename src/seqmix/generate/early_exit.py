"""Early exits: a token that shallow blocks are sure of does not go through the deep ones.

It takes the first exit (`seqmix.models.early_exit`) that is at least `threshold` confident. Deep blocks that read
skipped tokens later, all at once: Bae et al. 2023 (arXiv:2310.05424), section 4.1.

Axes: N rows, T time, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, cat

from seqmix.core.state import State, select_rows
from seqmix.generate._reader import Reader, Reading
from seqmix.models.early_exit import EarlyExits


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

    def __init__(self, exits: EarlyExits, *, threshold: float, catch_up: bool = True) -> None:
        self.exits = exits.eval()
        self.inside = exits.known[0].eval().model
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
