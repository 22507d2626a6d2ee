"""Set-based prompting: some parts of a prompt are a set, so the model cannot tell their order.

    before, {member, member, ...}, after

Every member starts at the same position, and its tokens see `before` and their own member alone; `after` sees all and
goes on from the position behind the longest member. Whatever order the members are written in, every token has the
same position and sees the same set, so the output is the same but for rounding.
McIlroy-Young et al. 2024 (arXiv:2406.06581), section 3: attention masks and positions of any Transformer that takes
them; a recurrence reads in order and cannot.

Axes: T time, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from seqmix.core.errors import ConfigError, DataError
from seqmix.generate._method import at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Arrangement(NamedTuple):
    """Token ids [T], their positions [T], and which token (row) sees which (column) [T, T]."""

    ids: Tensor
    positions: Tensor
    seen: Tensor


@dataclass(frozen=True)
class SetPrompt:
    """A prompt of token ids, the middle of which is a set."""

    before: list[int]
    members: list[list[int]]
    after: list[int]

    def __post_init__(self) -> None:
        if not self.after or not all(self.members):
            raise DataError(
                "SetPrompt: `after` and every member need a token, for the text goes on after them."
            )

    def arrange(self) -> Arrangement:
        """The prompt as one row of tokens."""
        parts = [self.before, *self.members, self.after]
        first = len(self.before)
        behind = first + max(map(len, self.members), default=0)
        starts = [0, *[first] * len(self.members), behind]
        owners = torch.cat([torch.full((len(part),), place) for place, part in enumerate(parts)])
        positions = torch.cat(
            [torch.arange(start, start + len(p)) for start, p in zip(starts, parts, strict=True)]
        )
        ids = torch.tensor([token for part in parts for token in part])
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        own = owners.unsqueeze(1) == owners
        behind_all = owners.unsqueeze(1) == len(parts) - 1
        return Arrangement(ids, positions, causal & (own | (owners == 0) | behind_all))


@torch.inference_mode()
def read_set(model: PreTrainedModel, prompt: SetPrompt) -> Tensor:
    """Logits [V] of the token after the prompt; raises `ConfigError` for a model that cannot read sets."""
    return _read(model, prompt)[0]


@torch.inference_mode()
def continue_set(
    model: PreTrainedModel,
    prompt: SetPrompt,
    *,
    new_tokens: int,
    ends: frozenset[int] = frozenset(),
) -> list[int]:
    """The likeliest token each time, after a prompt with a set; a token of `ends` is the last."""
    at_least("new_tokens", new_tokens, 1)
    logits, cache = _read(model, prompt)
    position = int(prompt.arrange().positions[-1])
    ids = [int(logits.argmax())]
    while len(ids) < new_tokens and ids[-1] not in ends:
        place = torch.tensor([[position + len(ids)]], device=model.device)
        output = model(
            input_ids=torch.tensor([ids[-1:]], device=model.device),
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        ids.append(int(output.logits[0, -1].argmax()))
    return ids


def _read(model: PreTrainedModel, prompt: SetPrompt) -> tuple[Tensor, object]:
    if not {"attention_mask", "position_ids"} <= set(inspect.signature(model.forward).parameters):
        raise ConfigError(
            f"{type(model).__name__} takes no positions, so the parts of a set cannot share them. Give a Transformer "
            "of transformers, such as smollm2-135m."
        )
    ids, positions, seen = prompt.arrange()
    hidden = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(
        ~seen, torch.finfo(model.dtype).min
    )
    output = model(
        input_ids=ids[None].to(model.device),
        position_ids=positions[None].to(model.device),
        attention_mask=hidden[None, None].to(model.device),
        use_cache=True,
    )
    return output.logits[0, -1], output.past_key_values
