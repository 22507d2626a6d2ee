"""Evaluate a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seqmix.cli._terminal import DATA, MODEL, Json, print_json, print_table, print_text, work
from seqmix.core.errors import ConfigError, RangeError


def run(
    model: Annotated[str, typer.Argument(help=MODEL, show_default=False)],
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            help="Or tasks of lm-evaluation-harness, with commas between, e.g. 'arc_easy,piqa'."
        ),
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="Folder with further tasks of the harness, as YAML files.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents of each task of the harness; all by default.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of context per row.")] = 1024,
    tokens: Annotated[
        str,
        typer.Option(
            help="About so many tokens are scored, evenly spread over the text; 'all' for the whole text."
        ),
    ] = "65536",
    json: Json = False,
) -> None:
    """Measure perplexity and bits per byte of a language model on a text, or its score on tasks.

    Bits per byte compare models with different tokenizers; perplexities do not. The answer says how many
    tokens were scored (`tokens`), and of how many (`text_tokens`).

    Example: `seqmix eval runs/hybrid --data shakespeare --json`
    """
    from seqmix.train import evaluate

    if (data is None) == (harness is None):
        raise ConfigError("Give either --data or --harness.")
    if harness is not None:
        scores = _harness(model, harness, include, limit)
        if json:
            print_json(scores)
        else:
            rows = [
                [task, name, value]
                for task, found in scores.items()
                for name, value in found.items()
            ]
            print_table(["task", "figure", ""], rows)
        return
    assert data is not None

    with work(resume="Nothing is kept of an evaluation: the same command starts again."):
        result = evaluate(model, data, length=length, tokens=_tokens(tokens))
    if json:
        print_json(result)
        return
    print_text(
        f"perplexity {result['perplexity']:.4g}, {result['bits_per_byte']:.4f} bits per byte "
        f"(scored {result['tokens']:,} of {result['text_tokens']:,} tokens, {result['bytes']:,} bytes)"
    )


def _harness(
    model: str, tasks: str, include: Path | None, limit: int | None
) -> dict[str, dict[str, float]]:
    from seqmix.measure.harness import harness
    from seqmix.models.pretrained import load_language_model

    with work(resume="Nothing is kept of an evaluation: the same command starts again."):
        made, tokenizer = load_language_model(model)
        if tokenizer is None:
            raise ConfigError(f"{model} comes without a tokenizer, which the harness needs.")
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        return harness(made, tokenizer, names, include=include, limit=limit)


def _tokens(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise RangeError(f"--tokens {text!r}, wanted a whole number or 'all'.") from None
