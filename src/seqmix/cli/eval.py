"""Evaluate a language model."""

from __future__ import annotations

from typing import Annotated

import typer

from seqmix.cli._terminal import DATA, MODEL, Json, print_json, print_text, work


def run(
    model: Annotated[str, typer.Argument(help=MODEL, show_default=False)],
    data: Annotated[str, typer.Option(help=DATA)],
    length: Annotated[int, typer.Option(help="Tokens of context per row.")] = 1024,
    json: Json = False,
) -> None:
    """Measure perplexity and bits per byte of a language model on a text.

    Bits per byte compare models with different tokenizers; perplexities do not.

    Example: `seqmix eval runs/hybrid --data shakespeare --json`
    """
    from seqmix.train import evaluate

    with work(resume="Nothing is kept of an evaluation: the same command starts again."):
        result = evaluate(model, data, length=length)
    if json:
        print_json(result)
        return
    print_text(
        f"perplexity {result['perplexity']:.4g}, {result['bits_per_byte']:.4f} bits per byte "
        f"({result['tokens']:,} tokens, {result['bytes']:,} bytes)"
    )
