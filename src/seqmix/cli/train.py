"""Train a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from seqmix.cli._terminal import DATA, Json, Seed, print_json, print_text, work
from seqmix.core.errors import ConfigError


def run(
    data: Annotated[str, typer.Argument(help=DATA, show_default=False)],
    model: Annotated[
        str,
        typer.Option(help="A layout such as '3x[mamba2], attention', or a model to go on from."),
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
    schedule: Annotated[str, typer.Option(help="cosine or warmup_stable_decay.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the run that warms up.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.1,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    parameters: Annotated[
        str | None, typer.Option(help="Train only these: all, head, last or lora.")
    ] = None,
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
    given = {key: value for key, value in spec.items() if value is not None}
    with work(resume=f"The same command goes on from the last checkpoint in {out}."):
        start, own = _model(model, given)
        trained = train(
            start,
            data,
            out=out,
            steps=steps,
            tokens=tokens,
            seconds=seconds,
            length=length,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            precision=precision,
            parameters=parameters,
            save_every=save_every,
            evaluate_every=evaluate_every,
            seed=seed,
            **{"tokenizer": tokenizer, **own},
        )
    forms = [f"{operator}: {form}" for operator, form in trained.forms]
    if json:
        print_json({"folder": str(trained.folder), **trained.record(), "forms": forms})
        return
    quality = ", ".join(f"{name} {value:.4g}" for name, value in trained.evaluation.items())
    print_text(
        f"{trained.steps:,} steps, {trained.tokens:,} tokens in {trained.seconds:.0f} s "
        f"({trained.tokens_per_second:,.0f} tokens/s)\nOn text that was held back: {quality}"
    )
    print_text(f"Operators ran as: {', '.join(forms)}.")
    print_text(f'Try it: seqmix generate {out} --prompt "To be"')


def _model(model: str, spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What to train, and its tokenizer: a saved or named model as it is, a layout as a specification."""
    from seqmix.models.backbone import ModelSpec
    from seqmix.models.pretrained import ASSETS, load_language_model

    if not Path(model).is_dir() and model not in ASSETS:
        return ModelSpec.from_dict({"layout": model, **spec}), {}
    if spec:
        raise ConfigError(
            f"{model} is a trained model, whose {', '.join(spec)} cannot change. "
            "Leave these options out, or give a layout."
        )
    if Path(model).is_dir():
        return model, {}
    loaded, words = load_language_model(model)
    return loaded, {"tokenizer": words}
