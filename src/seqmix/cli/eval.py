"""Evaluate a language model."""

from __future__ import annotations

from typing import Annotated

import typer

from seqmix.cli._terminal import DATA, MODEL, Json, print_json, print_text, work
from seqmix.core.errors import RangeError


def run(
    model: Annotated[str, typer.Argument(help=MODEL, show_default=False)],
    data: Annotated[str, typer.Option(help=DATA)],
    length: Annotated[int, typer.Option(help="Tokens of context per row.")] = 1024,
    tokens: Annotated[
        str,
        typer.Option(
            help="About so many tokens are scored, evenly spread over the text; 'all' for the whole text."
        ),
    ] = "65536",
    json: Json = False,
) -> None:
    """Measure perplexity and bits per byte of a language model on a text.

    Bits per byte compare models with different tokenizers; perplexities do not. The answer says how many
    tokens were scored (`tokens`), and of how many (`text_tokens`).

    Example: `seqmix eval runs/hybrid --data shakespeare --json`
    """
    from seqmix.train import evaluate

    with work(resume="Nothing is kept of an evaluation: the same command starts again."):
        result = evaluate(model, data, length=length, tokens=_tokens(tokens))
    if json:
        print_json(result)
        return
    print_text(
        f"perplexity {result['perplexity']:.4g}, {result['bits_per_byte']:.4f} bits per byte "
        f"(scored {result['tokens']:,} of {result['text_tokens']:,} tokens, {result['bytes']:,} bytes)"
    )


def _tokens(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise RangeError(f"--tokens {text!r}, wanted a whole number or 'all'.") from None
