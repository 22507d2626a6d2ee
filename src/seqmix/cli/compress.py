"""Make a pretrained language model cheaper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seqmix.cli._compression import answer
from seqmix.cli._terminal import DATA, MODEL, Json, Seed, say, work


def run(
    model: Annotated[str, typer.Argument(help=MODEL, show_default=False)],
    data: Annotated[str, typer.Option(help=f"{DATA} A tenth of it is held out.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and report.html.")],
    recipe: Annotated[
        str | None, typer.Option(help="Transforms, e.g. 'finercut:0.25 | slice:0.2 | int8'.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Or limits to search for, e.g. 'latency<0.6x, loss<1.05x' (x: times the original)."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Recipes that a search tries.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens per window of text.")] = 256,
    windows: Annotated[int, typer.Option(help="Windows that transforms may look at.")] = 64,
    evaluation_tokens: Annotated[int, typer.Option(help="Held-out tokens that are scored.")] = 8192,
    questions: Annotated[
        int, typer.Option(help="Zero-shot questions of each kind; 0 for none.")
    ] = 16,
    passkey_length: Annotated[
        int, typer.Option(help="Tokens of the prompts that hide a passkey; 0 for none.")
    ] = 256,
    context: Annotated[
        int, typer.Option(help="Tokens of text at which speeds are measured.")
    ] = 512,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Prune, slice, factorise and quantise a language model, and measure what each step costs and saves.

    OUT then is a checkpoint that `from_pretrained` loads, with report.html and result.json; the original is never
    changed. It says what each step needs before it starts. After Ctrl-C, or if the machine went down, the same command
    goes on. `seqmix list transforms` shows what a recipe can hold.

    Example: `seqmix compress smollm2-135m --recipe "finercut:0.25 | int8" --data shakespeare --out runs/small`
    """
    from seqmix.search import compress

    with work(resume="The same command goes on after the last finished step."):
        made = compress(
            model,
            data,
            recipe=recipe,
            budget=budget,
            out=out,
            trials=trials,
            length=length,
            windows=windows,
            evaluation_tokens=evaluation_tokens,
            questions=questions,
            passkey_length=passkey_length or None,
            context=context,
            seed=seed,
            say=say,
        )
    answer(made, json=json)
