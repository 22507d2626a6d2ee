"""The command `seqmix`: one file per subcommand, whose function `run` is the command.

The parser comes from the function's signature, its help from the docstring. A file here imports nothing
heavy before it runs, so that `seqmix --help` answers at once.
"""

# Importing the subcommand `list` binds that name here, so this module must not use the built-in one.
from seqmix.cli._main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
