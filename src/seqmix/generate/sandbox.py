"""Runs programs that a model has written, in processes that can do little harm.

    values = sandbox.run("def f(x): return x + 1", ["f(1)", "f('a')"])        # ["2", None]

A server process, started once in isolated mode (`python -I -S`) with an empty environment in an empty folder, makes a
child for every program. In the child:

- address space and time are bounded: a program that allocates too much fails, one that takes too long is killed;
- an audit hook of Python refuses everything that Python reports but compiling and running code: opening files,
  sockets, starting processes, signals, imports. Eight modules are there already: collections, functools, heapq,
  itertools, math, operator, re and string;
- where the kernel permits, there is no network device, whatever the hook does; `has_own_network` says so;
- limits of the kernel forbid to write files or to dump core; what the program prints is lost, and what it returns is
  read up to a megabyte;
- what is expected of a program stays with the caller, so a program cannot look it up.

This protects against programs that a model writes by mistake. It is no wall against an attacker: a hook can be got
around by whoever corrupts the memory of the interpreter, and then has the rights of this user, but for the network
where it is gone. Run hostile programs in a container or a virtual machine. Linux, macOS and other POSIX systems.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from seqmix.core.errors import ConfigError
from seqmix.generate._method import at_least

SERVER = Path(__file__).parent / "_sandbox_server.py"


class Sandbox:
    """Runs programs, each for at most `seconds` in at most `memory` bytes; a context manager.

    Raises `RangeError` for limits in which no program can run, `ConfigError` where its process cannot run.
    """

    def __init__(self, *, seconds: float = 2.0, memory: int = 256 << 20) -> None:
        at_least("seconds", seconds, 0.01)
        at_least("memory", memory, 64 << 20)
        self.seconds = seconds
        self.memory = memory
        self.has_own_network = False
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Sandbox:
        self._folder = tempfile.TemporaryDirectory()
        self._server = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env={},
            start_new_session=True,
            text=True,
        )
        self.has_own_network = json.loads(self._line())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.kill()
        self._server.communicate()
        self._server = None
        self._folder.cleanup()

    def run(self, program: str, expressions: Sequence[str]) -> list[str | None]:
        """The `repr` of each expression's value after the program, None where it fails or is not reached in time."""
        if self._server is None:
            raise ConfigError("Sandbox: it runs programs inside a `with` block only.")
        assert self._server.stdin is not None
        asked = [program, list(expressions), self.seconds, self.memory]
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._server.stdin.write(json.dumps(asked) + "\n")
            self._server.stdin.flush()
        found: list[str | None] = json.loads(self._line())
        return found

    def _line(self) -> str:
        assert self._server is not None
        assert self._server.stdout is not None
        if line := self._server.stdout.readline():
            return line
        raise ConfigError(
            "Sandbox: its process has ended. It needs a POSIX system that allows limits on processes."
        )
