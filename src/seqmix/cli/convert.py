"""Put other mixers in the place of a pretrained model's attention."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from seqmix.cli._compression import answer
from seqmix.cli._terminal import DATA, MODEL, Json, Seed, say, work
from seqmix.core.errors import ConfigError


def run(
    model: Annotated[str, typer.Argument(help=MODEL, show_default=False)],
    to: Annotated[str, typer.Option(help="A causal mixer, such as liger, lawcat or mamba2.")],
    data: Annotated[str, typer.Option(help=f"{DATA} A tenth of it is held out.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and report.html.")],
    keep_attention: Annotated[
        str, typer.Option(help="Share of the layers that stay attention, such as 1/4 or 0.25.")
    ] = "1/4",
    transfer_tokens: Annotated[
        int, typer.Option(help="With which each new mixer learns what attention did.")
    ] = 16384,
    recover_tokens: Annotated[
        int, typer.Option(help="Of training afterwards; 0 for none.")
    ] = 16384,
    length: Annotated[int, typer.Option(help="Tokens per window of text.")] = 256,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Linearise a pretrained Transformer: attention gives way to a recurrence with a state of fixed size.

    The layers whose loss hurts most stay attention. OUT then is a checkpoint that `from_pretrained` loads, with
    report.html and result.json. After Ctrl-C the same command goes on.

    Example: `seqmix convert smollm2-135m --to liger --keep-attention 1/4 --data shakespeare --out runs/liger`
    """
    from seqmix.search import convert

    with work(resume="The same command goes on after the last finished step."):
        made = convert(
            model,
            data,
            to=to,
            out=out,
            keep_attention=_share(keep_attention),
            transfer_tokens=transfer_tokens,
            recover_tokens=recover_tokens,
            length=length,
            seed=seed,
            say=say,
        )
    answer(made, json=json)


def _share(text: str) -> float:
    try:
        share = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--keep-attention {text!r}, wanted a share such as 1/4 or 0.25.")
    return share
