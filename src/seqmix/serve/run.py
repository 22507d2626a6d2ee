"""From the names of models to a running server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seqmix.convert.hub import to_seqmix
from seqmix.core.errors import ConfigError
from seqmix.core.extras import require
from seqmix.models.pretrained import load_language_model
from seqmix.serve.answers import Served
from seqmix.serve.engine import Engine, Limits
from seqmix.serve.reader import SeqmixReader


def prepare(model: str | Path, limits: Limits) -> Served:
    """A model by name, of this package or of a family of transformers that `to_seqmix` takes."""
    made, tokenizer = load_language_model(model)
    if tokenizer is None:
        raise ConfigError(f"{model} comes without a tokeniser, so it cannot read text.")
    settings = made.generation_config.eos_token_id
    ends = settings if isinstance(settings, list) else [settings, tokenizer.eos_token_id]
    name = Path(model).name or str(model)
    reader = SeqmixReader(to_seqmix(made))
    return Served(
        name, Engine(reader, limits), tokenizer, frozenset(end for end in ends if end is not None)
    )


def serve(
    models: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Answers over HTTP until it is interrupted; `docs/serve.md` describes the API."""
    uvicorn = require("uvicorn", extra="serve")
    require("fastapi", extra="serve")
    from seqmix.serve.app import create_app

    served = [prepare(model, limits or Limits()) for model in models]
    names = [each.name for each in served]
    if len({*names}) < len(names):
        raise ConfigError(f"Two models have one name: {', '.join(names)}. Rename a folder.")
    uvicorn.run(create_app(served, api_key=api_key), host=host, port=port, log_level="warning")
