"""Passkey retrieval for models with a tokeniser: a number stands in a long filler text and is asked for at its end.

The problem of Mohtashami & Jaggi 2023 (arXiv:2305.16300), section 4.2, in sentences of our own. Prompts have an
exact number of tokens, and the answer is decoded greedily.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqmix.core.errors import RangeError
from seqmix.tasks.passkey import FILLER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SENTENCES = [f" {sentence}." for sentence in FILLER.decode().strip(" .").split(". ")]
HIDDEN = " The pass key is {number}. Remember it. {number} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
TOKENS_AT_A_TIME = 4096  # which bounds the memory


@dataclass(frozen=True)
class Prompt:
    """`ids` [T] end with the question that the number `answer` answers."""

    ids: Tensor
    answer: str


def passkey_prompts(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    examples: int,
    *,
    digits: int = 5,
    seed: int = 0,
) -> list[Prompt]:
    """`examples` prompts of exactly `length` tokens, with the number at depths spread evenly over the text.

    Raises `RangeError` for a length without room for the number and the question.
    """
    if min(examples, digits) < 1:
        raise RangeError(f"passkey: examples={examples}, digits={digits}, wanted at least 1.")
    chosen = random.Random(f"{seed} {length} {digits}")
    sentences = [_ids(tokenizer, sentence) for sentence in SENTENCES]
    question = _ids(tokenizer, QUESTION)
    prompts = []
    for example in range(examples):
        number = "".join(chosen.choices("0123456789", k=digits))
        hidden = _ids(tokenizer, HIDDEN.format(number=number))
        room = length - len(hidden) - len(question)
        if room < 0:
            raise RangeError(
                f"passkey: length={length}, wanted at least {length - room}, the tokens of the number and the question."
            )
        filler = _filler(sentences, chosen.randrange(len(sentences)), room)
        place = round((example + chosen.random()) / examples * len(filler))
        parts = [*filler[:place], hidden, *filler[place:], question]
        prompts.append(Prompt(torch.tensor([token for part in parts for token in part]), number))
    return prompts


def passkey_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    examples: int,
    *,
    digits: int = 5,
    seed: int = 0,
) -> float:
    """The share of `examples` prompts of `length` tokens after which `model` writes all digits of the number.

    Every digit has to be the model's first choice. Raises `RangeError` as `passkey_prompts` does.
    """
    prompts = passkey_prompts(tokenizer, length, examples, digits=digits, seed=seed)
    rows = max(1, TOKENS_AT_A_TIME // length)
    right = 0
    for start in range(0, examples, rows):
        some = prompts[start : start + rows]
        ids = torch.stack([prompt.ids for prompt in some]).to(model.device)
        longest = max(len(_ids(tokenizer, f" {prompt.answer}")) for prompt in some)
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )[:, length:]
        right += sum(
            tokenizer.decode(answer).strip().startswith(prompt.answer)
            for answer, prompt in zip(written, some, strict=True)
        )
    return right / examples


def _filler(sentences: list[list[int]], first: int, room: int) -> list[list[int]]:
    """Whole sentences of `room` tokens together; the one at the beginning may lack its own."""
    filler: list[list[int]] = []
    excess = -room
    while excess < 0:
        filler.append(sentences[(first + len(filler)) % len(sentences)])
        excess += len(filler[-1])
    return [filler[0][excess:], *filler[1:]] if filler else []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
