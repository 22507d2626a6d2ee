"""Small Python programs on lists of digits, as a language model sees them: examples of inputs and outputs, then code.

    1 5 2 > 6 3 2 | ... : "    x = x[::-1]\\n" "    x = [(v + " "1" ") % 10 for v in x]\\n" end

Every token is a piece of text, and a program is the pieces one after the other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from seqmix.data.packing import IGNORED
from seqmix.generate.sandbox import Sandbox

PLAIN = [
    "    x = x[::-1]\n",
    "    x = sorted(x)\n",
    "    x = x[1:]\n",
    "    x = x[:-1]\n",
    "    x = x[1:] + x[:1]\n",
    "    x = [v * 2 % 10 for v in x]\n",
    "    x = [9 - v for v in x]\n",
]
OPENED = {  # by a constant and an end
    "    x = [(v + ": ") % 10 for v in x]\n",
    "    x = [v for v in x if v != ": "]\n",
    "    x = [max(v, ": ") for v in x]\n",
    "    x = [min(v, ": ") for v in x]\n",
}
DIGITS = [str(digit) for digit in range(10)]
END, BECOMES, NEXT, CODE = "", ">", "|", ":"
TOKENS = [END, BECOMES, NEXT, CODE, *DIGITS, *PLAIN, *OPENED, *dict.fromkeys(OPENED.values())]
IDS = {token: place for place, token in enumerate(TOKENS)}
LENGTH = 4  # digits of an input


@dataclass(frozen=True)
class Problem:
    """Inputs and their outputs, some shown and some hidden, and a program that makes them."""

    program: list[int]
    shown: list[tuple[list[int], list[int]]]
    hidden: list[tuple[list[int], list[int]]]

    def prompt(self) -> list[int]:
        ids = []
        for given, wanted in self.shown:
            ids += [IDS[str(v)] for v in given] + [IDS[BECOMES]]
            ids += [IDS[str(v)] for v in wanted] + [IDS[NEXT]]
        return [*ids, IDS[CODE]]


def source(ids: list[int]) -> str:
    """The function that tokens are the body of."""
    return f"def f(x):\n{''.join(TOKENS[token] for token in ids)}    return x\n"


def statement(draw: random.Random) -> list[str]:
    opened = list(OPENED)
    chosen = draw.choice(PLAIN + opened + opened)
    if chosen in OPENED:
        return [chosen, draw.choice(DIGITS[1:9]), OPENED[chosen]]
    return [chosen]


def problem(draw: random.Random, statements: int, shown: int, hidden: int) -> Problem:
    """A random one, whose outputs are neither all alike nor the inputs; the program is ours, so it may run here."""
    while True:
        pieces = [token for _ in range(statements) for token in statement(draw)]
        program = [IDS[token] for token in [*pieces, END]]
        names: dict[str, object] = {}
        exec(source(program), names)
        function = names["f"]
        pairs = []
        for _ in range(shown + hidden):
            given = [draw.randrange(10) for _ in range(LENGTH)]
            pairs.append((given, function(given)))  # type: ignore[operator]
        outputs = [wanted for _, wanted in pairs]
        if any(given != wanted for given, wanted in pairs) and any(
            outputs[0] != o for o in outputs
        ):
            return Problem(program, pairs[:shown], pairs[shown:])


def problems(
    count: int, *, seed: int, statements: tuple[int, int], shown: int, hidden: int, held_out: bool
) -> list[Problem]:
    """As many, with a number of statements between two; of five programs, one is held out from training."""
    draw = random.Random(seed)
    found: list[Problem] = []
    while len(found) < count:
        one = problem(draw, draw.randint(*statements), shown, hidden)
        belongs = sum(place * token for place, token in enumerate(one.program, 1)) % 5 == 0
        if belongs == held_out:
            found.append(one)
    return found


def batch(some: list[Problem]) -> dict[str, Tensor]:
    """Prompts and programs, padded behind; only programs are learnt."""
    prompts = [one.prompt() for one in some]
    length = max(len(p) + len(one.program) for p, one in zip(prompts, some, strict=True))
    ids = torch.full((len(some), length), IDS[END])
    labels = torch.full((len(some), length), IGNORED)
    for row, (prompt, one) in enumerate(zip(prompts, some, strict=True)):
        whole = torch.tensor(prompt + one.program)
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return {"input_ids": ids, "labels": labels}


class Judge:
    """The share of a problem's tests that programs pass, each program run once."""

    def __init__(self, sandbox: Sandbox, one: Problem) -> None:
        self.sandbox = sandbox
        self.tests = one.shown + one.hidden
        self.shown = len(one.shown)
        self.known: dict[str, list[bool]] = {}

    def passes(self, ids: list[int]) -> list[bool]:
        code = source(ids)
        if code not in self.known:
            values = self.sandbox.run(code, [f"f({given})" for given, _ in self.tests])
            wanted = [repr(output) for _, output in self.tests]
            self.known[code] = [a == b for a, b in zip(values, wanted, strict=True)]
        return self.known[code]

    def public(self, ids: list[int]) -> float:
        """The share of the tests that the prompt shows."""
        passed = self.passes(ids)[: self.shown]
        return sum(passed) / len(passed)

    def hidden(self, ids: list[int]) -> float:
        """One if all hidden tests pass, else zero."""
        return float(all(self.passes(ids)[self.shown :]))
