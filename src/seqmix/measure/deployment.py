"""What it takes to serve long contexts: the speed limits of a machine, the costs of a model, and its users.

A user reads one long context in (prefill) and then asks questions, each answered token by token (decoding).
What a user's text needs of memory, its state, limits how many users fit beside the weights (concurrency);
more users than fit take turns, and every turn moves one state out and another in (context switching).

    prefill   = max(FLOPs / flops_per_second, bytes / bytes_per_second)
    decoding  = tokens * max(FLOPs, (weights + users * state) / bytes_per_second)
    users     = floor((memory - weights) / state)
    switching = 2 * state / swap_bytes_per_second

Fu 2024 (arXiv:2405.08944), section 2. There the state is a key-value cache; here it is whatever the model
keeps, so that recurrent and hybrid models are covered by the same formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

from seqmix.core.errors import ConfigError
from seqmix.measure.roofline import Roofline, calibrate
from seqmix.models.backbone import LanguageModel, ModelSpec

PREDICTED_BYTES = 4  # per number, in the cost models of mixers and channels


@dataclass(frozen=True)
class Hardware:
    """Speed limits and memory of what a model runs on."""

    name: str
    flops_per_second: float
    bytes_per_second: float  # between memory and arithmetic
    memory_bytes: float
    swap_bytes_per_second: float  # of state, to where it waits and back

    def times(self, devices: int) -> Hardware:
        """So many of them, each with its part of the weights and of the state (tensor parallelism)."""
        if devices < 1:
            raise ConfigError(f"times: devices={devices}, wanted at least 1.")
        return replace(
            self,
            name=f"{devices} x {self.name}",
            flops_per_second=self.flops_per_second * devices,
            bytes_per_second=self.bytes_per_second * devices,
            memory_bytes=self.memory_bytes * devices,
            swap_bytes_per_second=self.swap_bytes_per_second * devices,
        )


# Peaks in bfloat16 from the vendor's data sheets; 20 and 40 GB/s are what PCIe 4 and 5 give in practice.
A100 = Hardware("A100 80GB", 312e12, 2.0e12, 80 * 2**30, 20e9)
H100 = Hardware("H100 80GB", 989e12, 3.35e12, 80 * 2**30, 40e9)


def this_machine(memory_bytes: float, *, seconds: float = 0.4) -> Hardware:
    """The limits measured here: a matrix product, a copy, and for swapping a copy too (from memory to memory)."""
    roofline = calibrate(size=1024, megabytes=256, seconds=seconds)
    return Hardware(
        "this machine",
        roofline.flops_per_second,
        roofline.bytes_per_second,
        memory_bytes,
        roofline.bytes_per_second / 2,  # a copied byte is read and written
    )


@dataclass(frozen=True)
class Session:
    """What one user does: reads `context` tokens in, then asks `questions` with answers of `answer` tokens."""

    context: int
    questions: int = 1
    answer: int = 250  # about a screen of text


class _WithoutValues(TorchFunctionMode):
    """Leaves the initialisation out: weights on the meta device have no values, and it would take seconds."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__module__", None) == init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


class Deployment:
    """A model on some hardware, with `element_bytes` per number of weights and states.

    All times are lower bounds for what does not stay in caches: nothing stands for the overhead of calling
    operators.
    """

    def __init__(self, spec: ModelSpec, hardware: Hardware, *, element_bytes: int = 2) -> None:
        if element_bytes < 1:
            raise ConfigError(f"Deployment: element_bytes={element_bytes}, wanted at least 1.")
        with torch.device("meta"), _WithoutValues():
            self._model = LanguageModel(spec)
        self._scale = element_bytes / PREDICTED_BYTES
        self.spec = spec
        self.hardware = hardware
        self.weight_bytes = self._model.num_parameters() * element_bytes

    @property
    def roofline(self) -> Roofline:
        return Roofline(self.hardware.flops_per_second, self.hardware.bytes_per_second)

    def state_bytes(self, context: int) -> float:
        """Of one user's text after `context` tokens."""
        return self._model.backbone.state_bytes(context) * self._scale

    def prefill_seconds(self, context: int, *, chunk: int | None = None) -> float:
        """Reading `context` tokens, at once or in chunks through the state."""
        chunk = chunk or context
        starts = range(0, context, chunk)
        return sum(self._seconds(min(chunk, context - start), start, 1) for start in starts)

    def decode_seconds(self, context: int, *, tokens: int = 1, users: int = 1) -> float:
        """The next `tokens` of each of so many users who have read `context`; weights are read for all at once."""
        return tokens * self._seconds(1, context, users)

    def _seconds(self, length: int, context: int, users: int) -> float:
        cost = self._model.cost(length, context=context)
        moved = cost.bytes * self._scale
        shared = min(self.weight_bytes, moved)
        moved = shared + users * (moved - shared)
        flops = users * cost.flops
        return max(flops / self.hardware.flops_per_second, moved / self.hardware.bytes_per_second)

    def concurrency(self, context: int) -> int:
        """How many users' states fit into memory beside the weights."""
        free = self.hardware.memory_bytes - self.weight_bytes
        return max(0, int(free // self.state_bytes(context)))

    def switch_seconds(self, context: int) -> float:
        """Moving one user's state out and another's in."""
        return 2 * self.state_bytes(context) / self.hardware.swap_bytes_per_second

    def sessions_per_hour(self, session: Session, users: int) -> float:
        """Sessions that are finished per hour when so many users are served in turn.

        Users whose states fit together decode together. With more users than fit, each question brings a
        switch; 0 where not even one fits.
        """
        together = min(users, self.concurrency(session.context))
        if users < 1:
            raise ConfigError(f"sessions_per_hour: users={users}, wanted at least 1.")
        if together == 0:
            return 0.0
        reading = users * self.prefill_seconds(session.context)
        answer = self.decode_seconds(session.context, tokens=session.answer, users=together)
        answering = session.questions * users / together * answer
        switching = 0.0
        if users > together:
            switching = session.questions * users * self.switch_seconds(session.context)
        return 3600 * users / (reading + answering + switching)
