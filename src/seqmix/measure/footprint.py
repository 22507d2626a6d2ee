"""What language models take: bytes, parameters, operations, memory of their state, and time on this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.core.state import num_bytes
from seqmix.measure.memory import MEGABYTE
from seqmix.measure.speed import prefill
from seqmix.measure.timing import time_in_turn
from seqmix.models.backbone import LanguageModel
from seqmix.ops import record_forms

STEPS = 4  # tokens that one timed call of decoding writes


def stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that is saved with the model, tied ones once."""
    seen: set[int] = set()
    for tensor in model.state_dict().values():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            yield tensor


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the weights as they are stored."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(model))


@torch.inference_mode()
def footprints(
    models: Mapping[str, LanguageModel],
    *,
    context: int = 512,
    seconds: float = 2.0,
    rounds: int = 7,
    times: Collection[str] = ("prefill_ms", "decode_ms"),
) -> dict[str, dict[str, Any]]:
    """Figures of each model for one text of `context` tokens; `times` are medians of calls in turn.

    size_mb (MiB of weights as stored), parameters (numbers stored), flops (predicted, of the next token), state_mb (MiB
    that one text keeps), prefill_ms (reading the text), decode_ms (one more token), forms (what ran).
    """
    reading: dict[str, Callable[[], object]] = {}
    decoding: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        model.eval()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.spec.vocabulary, (1, context), generator=generator)
        with record_forms() as forms:
            state = prefill(model, ids)
            _decode(model, state)
        reading[name] = partial(prefill, model, ids)
        decoding[name] = partial(_decode, model, state)
        found[name] = {
            "size_mb": stored_bytes(model) / MEGABYTE,
            "parameters": sum(tensor.numel() for tensor in stored_tensors(model)),
            "flops": model.cost(1, context=context).flops,
            "state_mb": num_bytes(state) / MEGABYTE,
            "forms": sorted(map(list, forms)),
        }
    for name, calls, tokens in (("prefill_ms", reading, 1), ("decode_ms", decoding, STEPS)):
        if name in times:
            for key, timing in time_in_turn(calls, seconds=seconds, rounds=rounds).items():
                found[key][name] = timing.median * 1e3 / tokens
    return found


def _decode(model: LanguageModel, state: Any) -> None:
    token = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(STEPS):
        logits, state = model(token, state)
        token = logits[:, -1].argmax(-1, keepdim=True)
