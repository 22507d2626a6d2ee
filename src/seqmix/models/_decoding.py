"""Blocks in one compiled call, where a few tokens go through them.

While a model decodes, calling its parts one by one takes longer than what they compute. What is said here of a half of
a block is what the kernels of `seqmix.kernels.decoding` compute; any other goes on as it is written in `Block`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from seqmix.channels.glu import GatedLinearUnit
from seqmix.core.state import Growing, State
from seqmix.kernels import decoding
from seqmix.kernels._custom import needs_no_dispatcher
from seqmix.kernels._native import native
from seqmix.layers.norm import RMSNorm
from seqmix.layers.positions import turns_of_few
from seqmix.linears.int4 import Int4
from seqmix.linears.int8 import Int8
from seqmix.mixers.attention import Attention
from seqmix.ops._operator import note_form

if TYPE_CHECKING:
    from seqmix.models.backbone import Block

MOST = 32  # tokens of all texts; for more, what the parts of a block compute takes longer than their calls
MOST_HALVES = 4096  # the same of a channel mixer in bfloat16, which PyTorch multiplies slowly on most processors


class _Half(NamedTuple):
    """Half a block as the kernels read it."""

    weights: Any
    outputs: int
    forms: tuple[str, ...]  # of its layers, for `record_forms`


_Known = dict[Any, tuple[decoding.Origin, _Half]]
_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()  # as long as it is the same


def _half(block: Block, name: str, x: Tensor, width: int) -> _Half | None:
    """The "mixer" or "channel" of a block, for inputs like x but of this width; None where no kernel computes it."""
    if block.residual != "pre":
        return None
    known, key = _known.get(block, {}), (name, x.dtype, width)
    origin, half = known.get(key, (None, None))
    if half is None or origin is None or not origin.is_same():
        half = _mixer_half(block, x, width) if name == "mixer" else _channel_half(block, x, width)
        if half is None:
            return None
        of_block: dict[str, Any] = block._modules
        names = [f"{name}_norm", name, f"{name}_shortcut"]
        entries = [(of_block, name, of_block[name]) for name in names if name in of_block]
        modules = [module for _, _, module in entries if module is not None]
        _known.setdefault(block, {})[key] = decoding.Origin(modules, entries), half
    for form in half.forms:
        note_form(form, "native")
    return half


class _Call:
    """Halves that one compiled call computes, one after the other, for x [B, T, D]."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.width = x.shape[-1]
        self.halves: list[tuple[Any, decoding.Memory]] = []

    def add(self, half: _Half, memory: decoding.Memory = decoding.NO_MEMORY) -> None:
        self.halves.append((half.weights, memory))
        self.width = half.outputs

    def run(self) -> Tensor:
        return decoding.decode(self.x, self.halves)


def blocks_step(
    blocks: Sequence[tuple[Any, State]], x: Tensor
) -> tuple[Tensor, list[State]] | None:
    """x [B, T, D] through as many whole blocks, from the first on, as kernels compute; each is given with its state.

    To what the last of them writes and the states after; None where there are none.
    """
    if not _is_few(x, MOST):
        return None
    call, after = _Call(x), []
    for block, state in blocks:
        parts: dict[str, Any] = block._modules
        has_mixer, has_channel = (parts.get(name) is not None for name in ("mixer", "channel"))
        if not (has_mixer or has_channel) or not _is_untouched(block):
            break
        mixer = _half(block, "mixer", x, call.width) if has_mixer else None
        width = call.width if mixer is None else mixer.outputs
        channel = _half(block, "channel", x, width) if has_channel else None
        if (mixer is None and has_mixer) or (channel is None and has_channel):
            break
        if mixer is not None:
            memory, new = _memory(block, x, state)
            if memory is None:
                break
            call.add(mixer, memory)
            state = new
        if channel is not None:
            call.add(channel)
        after.append(state)
    return (call.run(), after) if after else None


def mixer_step(block: Block, x: Tensor, state: State) -> tuple[Tensor, State] | None:
    """x [B, T, D] and the state to x + mixer(norm(x)) and the state after; None where no kernel does it."""
    half = _half(block, "mixer", x, x.shape[-1]) if _is_few(x, MOST) else None
    if half is None:
        return None
    memory, state = _memory(block, x, state)
    if memory is None:
        return None
    call = _Call(x)
    call.add(half, memory)
    return call.run(), state


def channel_step(block: Block, x: Tensor) -> Tensor | None:
    """x [B, T, D] to x + channel(norm(x)); None where no kernel does it."""
    most = MOST_HALVES if x.dtype == torch.bfloat16 else MOST
    half = _half(block, "channel", x, x.shape[-1]) if _is_few(x, most) else None
    if half is None:
        return None
    call = _Call(x)
    call.add(half)
    return call.run()


def _mixer_half(block: Block, x: Tensor, width: int) -> _Half | None:
    """The half of attention, for inputs like x but of this width; None where no kernel computes it."""
    mixer: Any = block._modules.get("mixer")
    if type(mixer) is not Attention:
        return None
    c = mixer.config
    if c.window is not None or c.best is not None or c.qk_norm:
        return None
    norm: Any = _norm(block, x, width, "mixer")
    layers = None if norm is None else _layers(mixer, "query", "key", "value", "output")
    shortcut = _shortcut(block, "mixer")
    if layers is None or shortcut is None:
        return None
    scale = c.head_width**-0.5 if c.scale is None else c.scale
    weight, eps = norm
    weights = decoding.attention_half(weight, eps, layers, shortcut, c.head_width, scale)
    return _Half(weights, layers[-1][0].shape[0], _forms(*layers, shortcut))


def _channel_half(block: Block, x: Tensor, width: int) -> _Half | None:
    """The half of a gated unit, likewise."""
    channel: Any = block._modules.get("channel")
    if type(channel) is not GatedLinearUnit or channel.config.activation != "silu":
        return None
    norm: Any = _norm(block, x, width, "channel")
    layers = None if norm is None else _layers(channel, "gate", "up", "output")
    shortcut = _shortcut(block, "channel")
    if layers is None or shortcut is None:
        return None
    weight, eps = norm
    weights = decoding.gated_half(weight, eps, layers, shortcut)
    return _Half(weights, layers[-1][0].shape[0], _forms(*layers, shortcut))


def _memory(block: Block, x: Tensor, state: State) -> tuple[decoding.Memory | None, State]:
    """What attention reads and writes beside its weights, and the state after; None for a state of other rows."""
    mixer: Any = block._modules["mixer"]
    if state is None:
        return None, None
    keys, values, start = state["keys"], state["values"], state["start"]
    if not type(keys) is type(values) is Growing:
        return None, state
    c, tokens = mixer.config, x.shape[1]
    keys, values = keys.extended(tokens), values.extended(tokens)
    read = keys.tensor, values.tensor
    if not all(_is_kept(tensor, x, c) for tensor in read):
        return None, state
    turns: Any = (None, None)
    if c.rope_base is not None:
        first, starts = keys.length - tokens, start.tolist()
        if len({*starts}) == 1:
            del starts[1:]
        places = tuple([first - begin + t for begin in starts for t in range(tokens)])
        shape = len(starts), tokens
        turns = turns_of_few(places, shape, c.rope_base, c.turning, mixer.stretch, torch.float32)
    note_form("attention", "native")
    return (*read, start, *turns), {"keys": keys, "values": values, "start": start}


def head_step(head: nn.Module, features: Tensor) -> Tensor | None:
    """Features [B, T, D] of a few tokens to their logits [B, T, V]; None where no kernel does it."""
    if type(head) is not nn.Linear or features.ndim != 3 or not _is_few(features, MOST):
        return None
    weight, bias = head.weight, head.bias
    if weight.dtype != features.dtype or weight.shape[1] != features.shape[-1]:
        return None
    if not (_is_plain(weight) and _is_plain(bias) and _is_untouched(head)):
        return None
    return decoding.linear_step(features, weight, bias)


def _is_few(x: Tensor, most: int) -> bool:
    """Whether there are kernels for such tensors, and they are worth their while."""
    if native is None or torch.is_grad_enabled() or not x.is_contiguous():
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or not 0 < x.shape[0] * x.shape[1] <= most:
        return False
    return needs_no_dispatcher(x, (x,)) and not torch.is_autocast_enabled("cpu")


def _norm(block: Block, x: Tensor, width: int, half: str) -> Any:
    """Weight and epsilon of this half's norm; None if the kernels cannot compute all around its layers."""
    parts: dict[str, Any] = block._modules
    norm = parts.get(f"{half}_norm")
    if type(norm) not in (nn.RMSNorm, RMSNorm) or norm.eps is None:
        return None
    weight = norm._parameters["weight"]
    if weight is None or weight.dtype != x.dtype or weight.shape != (width,):
        return None
    if not _is_plain(weight):
        return None
    return (weight, norm.eps) if _is_untouched(norm) and _is_untouched(parts[half]) else None


def _shortcut(block: Block, half: str) -> Any:
    """The shortcut around this half as a layer, or `NOTHING`; None for one that the kernels do not take."""
    if block._modules.get(f"{half}_shortcut") is None:
        return decoding.NOTHING
    layers = _layers(block, f"{half}_shortcut")
    return layers and layers[0]


def _is_untouched(module: nn.Module) -> bool:
    """Whether nobody wants to be told when the module is called, or has put another function in its place."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _is_plain(tensor: Tensor | None) -> bool:
    """Whether a kernel may read it where it lies: no subclass (as quantised weights are), on the CPU, without gaps."""
    if tensor is None:
        return True
    return type(tensor) in (Parameter, Tensor) and tensor.is_cpu and tensor.is_contiguous()


def _is_kept(tensor: Tensor, x: Tensor, config: Any) -> bool:
    """Whether keys or values of a state belong to the rows of x, in its dtype."""
    if type(tensor) is not Tensor or not tensor.is_cpu or tensor.stride(-1) != 1:
        return False
    rows, _, *heads = tensor.shape
    return (
        tensor.dtype == x.dtype and rows == len(x) and heads == [config.groups, config.head_width]
    )


def _layers(part: nn.Module, *names: str) -> Any:
    """The weights of linear layers as the kernels read them; None if one is of another kind."""
    found = []
    for name in names:
        module: Any = part._modules[name]
        kind = type(module)
        held = module._parameters if kind is nn.Linear else module._buffers
        if kind not in (nn.Linear, Int8, Int4) or not _is_untouched(module):
            return None
        factors, group = None, 0
        if kind is Int4:
            if module.input_bits is not None:
                return None
            weight, factors, group = held["codes"], held["factors"], module.group
        else:
            weight = held["weight"]
        if kind is nn.Linear and weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        if not all(map(_is_plain, held.values())):
            return None
        found.append((weight, held.get("scale"), held["bias"], factors, group))
    return tuple(found)


def _forms(*layers: decoding.Layer) -> tuple[str, ...]:
    """The operators that these layers stand for."""
    found = {
        "int8_matmul" if factors is None else "int4_matmul"
        for weight, _, _, factors, _ in layers
        if weight is not None and not weight.is_floating_point()
    }
    return tuple(sorted(found))
