"""What claims about fine-tuning a pretrained model share: the model, windows of text, losses on them.

`run["model"]` names the model; where it is None, a small random one of bytes stands for it, which shows that
a measurement runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.claims._claim import Run
from seqmix.core import extras
from seqmix.data.text import Corpus
from seqmix.models.pretrained import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALL = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
}


def pretrained(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A fresh copy of the model, and its tokeniser."""
    from seqmix.train.language import prepare

    if run["model"] is None:
        transformers = extras.require("transformers", extra="train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
        return prepare(small, "bytes", Corpus("none", ("none",)), seed=0)
    model, tokenizer = load(run["model"])
    assert tokenizer is not None
    return model, tokenizer


def windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int) -> Tensor:
    """`count` windows of `length` tokens, evenly spread over the text: ids [count, length]."""
    characters = 12 * length  # more than that many tokens need, in any text of ours
    starts = np.linspace(0, max(0, len(text) - characters - 1), count).astype(int)
    rows = []
    for start in starts:
        begin = text.find("\n", start) + 1  # at a line, not inside a word
        ids = tokenizer(text[begin : begin + characters], add_special_tokens=False).input_ids
        rows.append(ids[:length])
    return torch.tensor(rows)


def tune(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    learning_rate: float,
    *,
    loss: Callable[[Any, dict[str, Tensor]], Tensor] | None = None,
) -> None:
    """Trains the model in place, one step per batch in their order, as gently as fine-tuning asks for.

    `loss` takes the place of the model's own.
    """
    from seqmix.train.loop import run
    from seqmix.train.plan import Plan

    plan = Plan(
        steps=len(batches),
        tokens_per_step=batches[0]["input_ids"].numel(),
        learning_rate=learning_rate,
        weight_decay=0.0,
        warmup=0.1,
        progress=False,
    )
    run(model, lambda index: batches[index % len(batches)], plan, loss=loss)


@torch.no_grad()
def predictions(model: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    """Mean loss and mean entropy, both in nats, of the next-token distributions in windows [N, T]."""
    model.eval()
    losses, entropies = [], []
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        log_probabilities = F.log_softmax(logits.float(), dim=-1)
        losses.append(F.nll_loss(log_probabilities, row[1:]).item())
        entropies.append(-(log_probabilities.exp() * log_probabilities).sum(-1).mean().item())
    return float(np.mean(losses)), float(np.mean(entropies))


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> list[list[int]]:
    """The `new_tokens` likeliest next tokens, one after the other, of prompts [N, T]; no text ends earlier."""
    model.eval()
    made: Any = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return made[:, prompts.shape[1] :].tolist()
