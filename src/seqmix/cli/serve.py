"""Serve models over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seqmix.cli._terminal import MODEL, say


def run(
    models: Annotated[list[str], typer.Argument(help=MODEL, show_default=False)],
    host: Annotated[
        str, typer.Option(help="Address to listen at; this machine alone by default.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SEQMIX_API_KEY", help="Key that clients must send; none by default."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers under way at once, per model.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait, per model.")] = 128,
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of a prompt and its answer; by default what the model was made for, 8192 at most.",
            show_default=False,
        ),
    ] = None,
    body_mb: Annotated[int, typer.Option(min=1, help="Megabytes of one request.")] = 4,
    reports: Annotated[
        Path | None,
        typer.Option(
            help="Folder whose reports and claims' records are shown as pages, such as runs.",
            show_default=False,
        ),
    ] = None,
    states: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which the states of texts outlive the server.", show_default=False
        ),
    ] = None,
    states_mb: Annotated[int, typer.Option(min=1, help="Megabytes of it, per model.")] = 4096,
    cache_mb: Annotated[
        int, typer.Option(min=0, help="Megabytes of kept states, per model.")
    ] = 256,
) -> None:
    """Answer requests of OpenAI's API: completions, chats, streams.

    Example: `seqmix serve smollm2-135m --port 8000`
    """
    from seqmix.serve.engine import Limits
    from seqmix.serve.run import serve

    limits = Limits(rows=rows, queue=queue, cache=cache_mb << 20, states=states_mb << 20)
    say(f"Serving {', '.join(models)} at http://{host}:{port}/v1")
    serve(
        models,
        host=host,
        port=port,
        api_key=api_key,
        limits=limits,
        context=context,
        states=states,
        reports=reports,
        body_bytes=body_mb << 20,
    )
