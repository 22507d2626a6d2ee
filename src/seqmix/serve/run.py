"""From the names of models to a running server."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqmix.convert.hub import to_seqmix
from seqmix.core.errors import ConfigError
from seqmix.core.extras import require
from seqmix.models.hf import SeqmixConfig
from seqmix.models.pretrained import load_language_model
from seqmix.serve.answers import Served
from seqmix.serve.engine import Engine, Limits
from seqmix.serve.reader import Reader, SeqmixReader
from seqmix.serve.request import BODY_BYTES
from seqmix.serve.state_folder import StateFolder, fingerprint
from seqmix.serve.transformers_reader import TransformersReader


def prepare(
    model: str | Path,
    limits: Limits | None = None,
    *,
    context: int | None = None,
    states: Path | None = None,
) -> Served:
    """A model by name, of this package or of transformers; what `to_seqmix` does not take is read with its own cache.

    `context` is the most that a prompt and its answer may be together, in tokens; by default what the model was made
    for, within that of `limits`. `states` is a folder in which the states of texts outlive the server.
    Raises `ConfigError` for a model without a tokeniser, and a `context` beyond what the model was made for.
    """
    limits = limits or Limits()
    if states is not None and not limits.cache:
        raise ConfigError(
            "states: what is read from disk needs room in memory. Give it with --cache-mb."
        )
    made, tokenizer = load_language_model(model)
    if tokenizer is None:
        raise ConfigError(f"{model} comes without a tokeniser, so it cannot read text.")
    settings = made.generation_config.eos_token_id
    ends = settings if isinstance(settings, list) else [settings, tokenizer.eos_token_id]
    name = Path(model).name or str(model)
    most = longest_text(made.config)
    if context is not None and most is not None and context > most:
        raise ConfigError(
            f"context={context}, but {name} was made for texts of at most {most} tokens. Give at most {most}."
        )
    limits = dataclasses.replace(
        limits, context=context or min(limits.context, most or limits.context)
    )
    reader = reader_of(made)
    if isinstance(reader, TransformersReader) and not reader.goes_on:  # a prompt is read at once
        limits = dataclasses.replace(limits, chunk=limits.context, piece=limits.context)
    folder = None if states is None else StateFolder(states, fingerprint(made), limits.states)
    return Served(
        name,
        Engine(reader, limits, folder),
        tokenizer,
        frozenset(end for end in ends if end is not None),
    )


def reader_of(model: Any) -> Reader:
    """The reader of a causal language model; warns of one that stays a model of transformers."""
    try:
        return SeqmixReader(to_seqmix(model))
    except ConfigError as error:
        reason = str(error).partition(". ")[0]
    warnings.warn(
        f"{type(model).__name__} stays a model of transformers, whose texts are read one by one ({reason}).",
        stacklevel=2,
    )
    return TransformersReader(model)


def longest_text(config: Any) -> int | None:
    """Tokens of the longest texts that a model was made for; None where its configuration names no such length."""
    if isinstance(config, SeqmixConfig):
        if config.source is None:
            return config.to_spec().positions
        named = config.source
    else:
        named = config.get_text_config().to_dict()
    names = ("max_position_embeddings", "n_positions", "context_length")
    return next((int(named[name]) for name in names if named.get(name)), None)


def serve(
    models: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    limits: Limits | None = None,
    context: int | None = None,
    states: Path | None = None,
    body_bytes: int = BODY_BYTES,
    reports: Path | None = None,
) -> None:
    """Answers over HTTP until it is interrupted; `docs/serve.md` describes the API.

    `context` and `states` are those of `prepare`; `reports` is a folder whose reports and records are shown as pages.
    """
    uvicorn = require("uvicorn", extra="serve")
    require("fastapi", extra="serve")
    from seqmix.serve.app import create_app
    from seqmix.serve.reports import Reports

    pages = None if reports is None else Reports(reports)
    served = [prepare(model, limits, context=context, states=states) for model in models]
    names = [each.name for each in served]
    if len({*names}) < len(names):
        raise ConfigError(f"Two models have one name: {', '.join(names)}. Rename a folder.")
    app = create_app(served, api_key=api_key, body_bytes=body_bytes, reports=pages)
    uvicorn.run(app, host=host, port=port, log_level="warning")
