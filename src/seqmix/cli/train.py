"""Train a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from seqmix.cli._terminal import DATA, Json, Seed, print_json, print_table, print_text, work
from seqmix.core.errors import ConfigError


def run(
    data: Annotated[str, typer.Argument(help=DATA, show_default=False)],
    model: Annotated[
        str,
        typer.Option(help="A layout such as '3x[mamba2], attention', or a folder to go on from."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the trained model.")],
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds of training.")] = None,
    width: Annotated[
        int | None, typer.Option(help="Width of a layout's model [default: 128].")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of its mixers [default: 4].")] = None,
    depth: Annotated[int | None, typer.Option(help="Blocks; the layout repeats up to it.")] = None,
    channel: Annotated[str | None, typer.Option(help="Its channel mixer [default: glu].")] = None,
    tokenizer: Annotated[str, typer.Option(help="bytes, bpe:SIZE or a folder.")] = "bytes",
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 256,
    batch: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches per optimiser step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.1,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train a language model on text, from scratch or from a checkpoint.

    Give exactly one of --steps, --tokens and --seconds. After Ctrl-C, or if the machine went down, the
    same command goes on from the last checkpoint in --out.

    Example: `seqmix train shakespeare --model "3x[mamba2], attention" --steps 500 --out runs/hybrid`
    """
    from seqmix.train import train

    spec = {"width": width, "heads": heads, "depth": depth, "channel": channel}
    with work(resume=f"The same command goes on from the last checkpoint in {out}."):
        trained = train(
            _model(model, {key: value for key, value in spec.items() if value is not None}),
            data,
            out=out,
            steps=steps,
            tokens=tokens,
            seconds=seconds,
            length=length,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            precision=precision,
            tokenizer=tokenizer,
            save_every=save_every,
            evaluate_every=evaluate_every,
            seed=seed,
        )
    result = {
        "folder": str(trained.folder),
        "steps": trained.steps,
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "tokens_per_second": trained.tokens_per_second,
        **trained.evaluation,
        "forms": [f"{operator}: {form}" for operator, form in trained.forms],
    }
    if json:
        print_json(result)
        return
    rows = [[name.replace("_", " "), value] for name, value in result.items() if name != "forms"]
    print_table(["", ""], [[name, _rounded(value)] for name, value in rows])
    print_text(f"Operators ran as: {', '.join(result['forms'])}.")
    print_text(f'Try it: seqmix generate {out} --prompt "To be"')


def _model(model: str, spec: dict[str, Any]) -> Any:
    """A folder as it is; a layout with the given fields as a specification."""
    from seqmix.models.backbone import ModelSpec

    if Path(model).is_dir():
        if spec:
            raise ConfigError(
                f"{model} is a trained model, whose {', '.join(spec)} cannot change. "
                "Leave these options out, or give a layout."
            )
        return model
    return ModelSpec.from_dict({"layout": model, **spec})


def _rounded(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
