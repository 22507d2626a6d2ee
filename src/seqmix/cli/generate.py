"""Generate text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from seqmix.cli._terminal import MODEL, Json, Seed, print_json, print_text, work


def run(
    model: Annotated[str, typer.Argument(help=MODEL, show_default=False)],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sample at this temperature; without it, the likeliest token."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among this share of probability.")
    ] = None,
    beams: Annotated[int, typer.Option(help="Beams of a beam search.")] = 1,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Continue a prompt; the text appears as it is written.

    Example: `seqmix generate runs/hybrid --prompt "To be" --temperature 0.8`
    """
    from seqmix.generate import generate

    stdout = sys.stdout
    written = ""

    def show(piece: str) -> None:
        nonlocal written
        stdout.write(piece if written else prompt + piece)
        stdout.flush()
        written += piece

    with work(resume="Nothing is kept of a generation: the same command starts again."):
        text = generate(
            model,
            prompt,
            new_tokens=new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            beams=beams,
            seed=seed,
            stream=None if json or beams > 1 else show,
        )
    if json:
        print_json({"model": model, "prompt": prompt, "text": text})
    else:
        print_text("" if written else text)
