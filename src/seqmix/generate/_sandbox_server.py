"""The process in which `sandbox` runs programs: started alone, with the standard library only.

It answers one line of JSON with another. For every program it makes a child, whose output it reads up to a limit of
size and time, and which it then kills with all of its session.
"""

import collections
import contextlib
import ctypes
import functools
import heapq
import itertools
import json
import math
import operator
import os
import re
import resource
import select
import signal
import string
import sys
import time

MODULES = (collections, functools, heapq, itertools, math, operator, re, string)  # for programs
HARMLESS = frozenset(  # of what Python reports to audit hooks
    ("compile", "exec", "builtins.id", "object.__getattr__", "object.__setattr__", "code.__new__")
)
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # flags of unshare(2)
WRITTEN = 1 << 20  # bytes of results that are read


def leave_network() -> bool:
    """Whether the process could move to a network namespace of its own, in which there is no device."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)  # Linux has it
    return unshare is not None and unshare(NEW_USER | NEW_NETWORK) == 0


def refuse(event: str, arguments: object) -> None:
    if event not in HARMLESS:
        raise PermissionError(f"a program in the sandbox may not do this: {event}")


def limit(seconds: float, memory: int) -> None:
    """Bounds this process for ever: address space, processor time, files, processes."""
    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for what, most in wanted.items():
        resource.setrlimit(what, (most, most))


def run(program: str, expressions: list[str], output: int) -> None:
    """Runs the program and writes the value of each expression after it, or null, as a line of JSON."""
    sys.addaudithook(refuse)
    names: dict[str, object] = {"__name__": "program"}
    exec(compile(program, "program", "exec"), names)
    for expression in expressions:
        try:
            value: str | None = repr(eval(expression, names))
        except Exception:
            value = None
        os.write(output, (json.dumps(value) + "\n").encode())


def answer(program: str, expressions: list[str], seconds: float, memory: int) -> list[str | None]:
    """The values, null for those that a program did not come to."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            for stream in (1, 2):
                os.dup2(0, stream)
            os.dup2(writing, 3)
            os.closerange(4, 256)
            limit(seconds, memory)
            run(program, expressions, 3)
        finally:
            os._exit(0)
    os.close(writing)
    written, end = b"", time.monotonic() + seconds
    while len(written) < WRITTEN:
        left = end - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            break
        if not (piece := os.read(reading, 1 << 16)):
            break
        written += piece
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    return values(written, len(expressions))


def values(written: bytes, count: int) -> list[str | None]:
    """What a child wrote, which may be anything: a program can write there too."""
    found: list[str | None] = []
    for line in written.split(b"\n")[:-1][:count]:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        found.append(value if isinstance(value, str) else None)
    return found + [None] * (count - len(found))


def serve() -> None:
    say(leave_network())
    for line in sys.stdin:
        say(answer(*json.loads(line)))


def say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve()
