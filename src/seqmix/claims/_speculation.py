"""What claims about guessing ahead share: a model and the ways to decode with it, compared prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from seqmix.claims._claim import Finding
from seqmix.claims._timing import median_milliseconds

Ways = Mapping[
    str, tuple[Any, Any]
]  # a model or a reader, and a method; plain decoding comes first


def decoded(
    ways: Ways, prompts: list[Tensor], *, new_tokens: int, repeats: int = 0
) -> dict[str, Any]:
    """Of every way: how many texts are those of the first way, tokens per check, and with `repeats` the time."""

    def decode(model: Any, method: Any) -> list[Any]:
        return [method.run(model, prompt, new_tokens=new_tokens)[0] for prompt in prompts]

    texts = {name: decode(*way) for name, way in ways.items()}
    wanted = [text.ids for text in next(iter(texts.values()))]
    found: dict[str, Any] = {
        name: {
            "equal texts": sum(text.ids == ids for text, ids in zip(each, wanted, strict=True))
            / len(wanted),
            "tokens per check": [
                len(text.ids) / getattr(text, "checks", len(text.ids)) for text in each
            ],
        }
        for name, each in texts.items()
    }
    if repeats:
        calls = {name: lambda way=way: decode(*way) for name, way in ways.items()}
        for name, time in median_milliseconds(calls, repeats).items():
            found[name]["milliseconds per token"] = time / sum(map(len, wanted))
    return found


def same_texts(statement: str, found: Mapping[str, Any]) -> Finding:
    """Every way wrote what plain decoding wrote, in every group of `decoded` results."""
    equal = {
        group: {name: way["equal texts"] for name, way in ways.items()}
        for group, ways in found.items()
    }
    same = all(share == 1 for ways in equal.values() for share in ways.values())
    return Finding(
        statement,
        "equal tokens for every prompt",
        equal,
        "reproduced" if same else "not reproduced",
    )
