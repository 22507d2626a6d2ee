"""Conditional beam search: the likeliest continuation of those that have a property, such as not being degenerate.

    maximise over y   log p(y | x) + log P(A | x, y)

The likeliest texts of a language model are often empty or repeat themselves; conditioning on A, that they do not, keeps
the search for what is likely and leaves such texts out. Beams are ranked by the sum at every step, where P(A | y) of an
unfinished y is the chance that it will end with the property. The thesis learns that from the model's hidden states;
here it is any function of the tokens so far, a classifier or a rule. Yoshida 2024 (arXiv:2408.16241).

Axes: N beams, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqmix.core.errors import RangeError, ShapeError
from seqmix.core.state import select_rows
from seqmix.models.hf import SeqmixForCausalLM

Condition = Callable[[Tensor, Tensor], Tensor]
CONSIDERED = 4  # continuations per beam that the condition is asked about, the likeliest ones


@torch.no_grad()
def conditional_beam_search(
    model: SeqmixForCausalLM,
    prompt: Tensor,
    condition: Condition,
    *,
    beams: int = 4,
    new_tokens: int = 32,
    eos: int | None = None,
) -> tuple[Tensor, float]:
    """The best continuation [T'] of `prompt` [1, T] that is found, and its log p + log P(A), in nats.

    Args:
        model: a causal language model.
        prompt: token ids [1, T].
        condition: log P(A) [N] of continuations [N, t] so far, of which `finished` [N] says whether they have ended.
        beams: continuations that are kept.
        new_tokens: the longest continuation.
        eos: the token that ends one, itself included; none if None.

    Raises:
        ShapeError, RangeError: for arguments that do not fit.
    """
    if prompt.ndim != 2 or len(prompt) != 1 or not prompt.shape[1]:
        raise ShapeError(f"`prompt` has shape {list(prompt.shape)}, wanted [1, T] with a token.")
    if beams < 1 or new_tokens < 1:
        raise RangeError(f"beams={beams}, new_tokens={new_tokens}, wanted at least 1 of each.")
    logits, state = model.model(prompt)
    ids = prompt.new_empty(1, 0)
    likelihood = logits.new_zeros(1, dtype=torch.float32)
    best, highest = ids[0], -torch.inf
    for step in range(new_tokens):
        chances = likelihood.unsqueeze(1) + logits[:, -1].float().log_softmax(-1)
        count = min(chances.numel(), CONSIDERED * beams)
        values, places = chances.flatten().topk(count)
        rows, tokens = places // chances.shape[1], places % chances.shape[1]
        longer = torch.cat([ids[rows], tokens.unsqueeze(1)], dim=1)
        ended = tokens == eos if eos is not None else torch.zeros_like(tokens, dtype=torch.bool)
        finished = ended | (step == new_tokens - 1)
        scores = values + condition(longer, finished)
        done = scores.masked_fill(~finished, -torch.inf)
        if done.max() > highest:
            best, highest = longer[done.argmax()], float(done.max())
        going = scores.masked_fill(finished, -torch.inf)
        kept = going.topk(min(beams, count)).indices
        # What has fallen to the best score in likelihood alone can only stay below it: log P(A) <= 0.
        kept = kept[(going[kept] > -torch.inf) & (values[kept] > highest)]
        if not len(kept):
            break
        ids, likelihood = longer[kept], values[kept]
        state = select_rows(state, rows[kept])
        logits, state = model.model(tokens[kept].unsqueeze(1), state)
    return best, highest
