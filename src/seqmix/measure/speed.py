"""Speed of a language model on this machine, beside what its cost model predicts.

Reading a text (prefill) goes in chunks through the state; decoding feeds one token at a time to the state
after the context. Both are timed for one text, in float32, without gradients.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.core.state import State, num_bytes
from seqmix.measure.roofline import Roofline
from seqmix.measure.timing import Timing, summarise, time_calls
from seqmix.models.backbone import LanguageModel
from seqmix.ops import record_forms

CHUNK = 512  # tokens of a prompt that are read at once


def prefill(model: LanguageModel, ids: Tensor, state: State = None, *, chunk: int = CHUNK) -> State:
    """Reads ids [1, T] in chunks and returns the state after them."""
    for part in ids.split(chunk, dim=1):
        _, state = model(part, state)
    return state


def training_speed(
    model: LanguageModel, *, length: int, batch: int, seconds: float = 2.0
) -> Timing:
    """Tokens per second of forward, backward and an AdamW step on random tokens `[batch, length]`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.spec.vocabulary, (batch, length + 1), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()

    def step() -> None:
        logits, _ = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return time_calls(step, seconds=seconds).per(batch * length)


def decode_speed(
    model: LanguageModel, state: State, *, tokens: int = 32, warmup: int = 2
) -> Timing:
    """Seconds per token when decoding from `state`; the context grows by one with every sample."""
    token = torch.zeros(1, 1, dtype=torch.long)
    samples = []
    for _ in range(tokens + warmup):
        start = time.perf_counter()
        logits, state = model(token, state)
        token = logits[:, -1].argmax(-1, keepdim=True)
        samples.append(time.perf_counter() - start)
    return summarise(samples[warmup:])


@torch.inference_mode()
def inference_speed(
    model: LanguageModel,
    contexts: Sequence[int],
    *,
    roofline: Roofline | None = None,
    seconds: float = 1.0,
    tokens: int = 32,
    chunk: int = CHUNK,
) -> dict[str, Any]:
    """Prefill and decode speed and state size at each context, as plain values keyed by metric and context.

    `prefill_tokens_s` is the context divided by the time to read it from nothing, `decode_ms` the time of
    one more token after it; each has median, low, high, repeats and, with a `roofline`, `predicted`.
    `state_bytes` has `measured`, from the real state, and `predicted`, from the model's formula. `forms`
    says which implementation of which operator ran.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.spec.vocabulary, (1, max(contexts)), generator=generator)
    found: dict[str, Any] = {"prefill_tokens_s": {}, "decode_ms": {}, "state_bytes": {}}
    reading: set[tuple[str, str]] = set()
    decoding: set[tuple[str, str]] = set()
    for context in sorted(contexts):
        text, key = ids[:, :context], str(context)
        kept: list[State] = [None]

        def read(text: Tensor = text, kept: list[State] = kept) -> None:
            kept[0] = None  # two states at once would count twice in the peak memory
            kept[0] = prefill(model, text, chunk=chunk)

        with record_forms() as forms:
            # A long text was preceded by shorter ones, so only the first needs warming up.
            first = context == min(contexts)
            timing = time_calls(
                read, seconds=seconds, warmup=1 if first else 0, minimum=2, maximum=50
            )
        reading |= forms
        found["prefill_tokens_s"][key] = timing.per(context).to_dict()
        found["state_bytes"][key] = {
            "measured": num_bytes(kept[0]),
            "predicted": model.backbone.state_bytes(context),
        }
        with record_forms() as forms:
            decoded = decode_speed(model, kept[0], tokens=tokens)
        decoding |= forms
        found["decode_ms"][key] = decoded.scaled(1e3).to_dict()
        if roofline is not None:
            reach = predicted_prefill_seconds(model, context, roofline, chunk=chunk)
            found["prefill_tokens_s"][key]["predicted"] = context / reach
            step = roofline.seconds(model.cost(1, context=context))
            found["decode_ms"][key]["predicted"] = step * 1e3
    found["forms"] = {"prefill": sorted(map(list, reading)), "decode": sorted(map(list, decoding))}
    return found


def predicted_prefill_seconds(
    model: LanguageModel, context: int, roofline: Roofline, *, chunk: int = CHUNK
) -> float:
    """What the cost model and the roofline give for reading `context` tokens in chunks."""
    starts = range(0, context, chunk)
    return sum(
        roofline.seconds(model.cost(min(chunk, context - start), context=start)) for start in starts
    )


def predicted_training_speed(
    model: LanguageModel, *, length: int, batch: int, roofline: Roofline
) -> float:
    """Predicted training tokens per second: a backward pass costs about two forward passes."""
    return batch * length / roofline.seconds(3.0 * batch * model.cost(length))
