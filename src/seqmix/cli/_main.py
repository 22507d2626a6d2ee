"""The program: which subcommand is called, its parser, and what an error becomes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from seqmix import __version__
from seqmix.cli._terminal import Interrupted, say
from seqmix.core.catalog import Catalog
from seqmix.core.errors import NumericalError, SeqmixError
from seqmix.core.files import OutputError

COMMANDS = Catalog("seqmix.cli", "run")
FAILURES = (NumericalError, OutputError)  # the input was right and the run failed: exit 1, not 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 done, 1 the run failed, 2 the input is wrong, 130 interrupted. Any other error is a bug of ours and
    keeps its traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        get_command(application(arguments))(arguments, prog_name="seqmix")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1
    except SeqmixError as error:
        say(f"Error: {error}")
        return 1 if isinstance(error, FAILURES) else 2
    except Interrupted as interruption:
        say(f"\n{interruption}")
        return 130
    except KeyboardInterrupt:
        say("\nInterrupted. Nothing was left behind: the same command starts again.")
        return 130
    return 0


def application(arguments: list[str]) -> typer.Typer:
    """All commands, or only the one that is called: the others need not be imported."""
    application = typer.Typer(
        name="seqmix",
        help="Efficient sequence models: choose, train and run them, with every claim measured.",
        epilog="Example: seqmix compare --data shakespeare --out runs/first",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    application.callback()(_options)
    called = arguments[:1] if arguments and arguments[0] in COMMANDS.names() else COMMANDS.names()
    for name in called:
        application.command(name)(COMMANDS.get(name))
    return application


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of `seqmix` itself."""
