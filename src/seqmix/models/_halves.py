"""What blocks are for kernels: halves, whose weights are read where they lie.

What is said here of a half of a block is what the kernels of `seqmix.kernels.decoding` compute; any other goes on as it
is written in `Block`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from seqmix.channels.glu import GatedLinearUnit
from seqmix.kernels import decoding
from seqmix.layers.norm import RMSNorm
from seqmix.linears.int4 import Int4
from seqmix.linears.int8 import Int8
from seqmix.mixers.attention import Attention

if TYPE_CHECKING:
    from seqmix.models.backbone import Block

KINDS = (torch.float32, torch.bfloat16)  # dtypes that kernels read


class Halves(NamedTuple):
    """What a block is for kernels: halves, either of which may be missing, and the mixer of the first."""

    mixer: decoding.Half | None
    attention: Any
    channel: decoding.Half | None


class KnownBlocks:
    """Blocks as kernels read them, looked at once: for who reads with a model that nobody changes meanwhile.

    Values of weights in float32, bfloat16 or few bits may change. Other modules, settings, hooks, or tensors in the
    place of weights are not seen: what was there before is read, and stays in memory as long as this. No storage may
    get other memory, as `share_memory_` gives it. Blocks that are not known are looked at for every token, which takes
    a fifth of the time of a small model.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[Block, torch.dtype], Halves] = {}

    def of(self, block: Block, x: Tensor, width: int) -> Halves | None:
        """As `halves_of` finds it the first time that kernels compute all of it."""
        found = self._found.get((block, x.dtype)) or halves_of(block, x, width)
        if found is not None and (block, x.dtype) not in self._found:
            mixer, channel = (
                None if half is None else half.holding() for half in (found.mixer, found.channel)
            )
            found = self._found[block, x.dtype] = Halves(mixer, found.attention, channel)
        return found


def halves_of(block: Block, x: Tensor, width: int) -> Halves | None:
    """The block for inputs like x but of this width; None where not all of it is computed by kernels."""
    parts: dict[str, Any] = block._modules
    if not is_untouched(block):
        return None
    mixer = channel = attention = None
    if parts.get("mixer") is not None:
        attention = parts["mixer"]
        mixer = mixer_half(block, x, width)
        if mixer is None:
            return None
        width = mixer.outputs
    if parts.get("channel") is not None:
        channel = channel_half(block, x, width)
        if channel is None:
            return None
    if mixer is None and channel is None:
        return None
    return Halves(mixer, attention, channel)


def mixer_half(block: Block, x: Tensor, width: int) -> decoding.Half | None:
    """The half of attention, for inputs like x but of this width; None where no kernel computes it."""
    mixer: Any = block._modules.get("mixer")
    if type(mixer) is not Attention:
        return None
    c = mixer.config
    if c.window is not None or c.best is not None or c.qk_norm:
        return None
    around: Any = _around(block, x, width, "mixer")
    layers = None if around is None else _layers(mixer, "query", "key", "value", "output")
    if layers is None:
        return None
    (norm, eps, shortcut), scale = around, c.head_width**-0.5 if c.scale is None else c.scale
    return decoding.Half(norm, eps, layers[:-1], layers[-1], shortcut, c.head_width, scale)


def channel_half(block: Block, x: Tensor, width: int) -> decoding.Half | None:
    """The half of a gated unit, likewise."""
    channel: Any = block._modules.get("channel")
    if type(channel) is not GatedLinearUnit or channel.config.activation != "silu":
        return None
    around: Any = _around(block, x, width, "channel")
    layers = None if around is None else _layers(channel, "gate", "up", "output")
    if layers is None:
        return None
    norm, eps, shortcut = around
    return decoding.Half(norm, eps, layers[:-1], layers[-1], shortcut)


def _around(block: Block, x: Tensor, width: int, half: str) -> Any:
    """What is around the layers of this half: weight and epsilon of its norm, and its shortcut; None for what kernels
    do not compute."""
    parts: dict[str, Any] = block._modules
    norm, part, shortcut = (parts.get(name) for name in (f"{half}_norm", half, f"{half}_shortcut"))
    if block.residual != "pre" or parts.get(f"{half}_last_norm") is not None:
        return None
    if type(norm) not in (nn.RMSNorm, RMSNorm) or norm.eps is None:
        return None
    weight = norm._parameters.get("weight")
    if weight is None or weight.dtype != x.dtype or weight.shape != (width,):
        return None
    if not (is_plain(weight) and is_untouched(norm) and is_untouched(part)):
        return None
    layers = (decoding.NOTHING,) if shortcut is None else _layers(block, f"{half}_shortcut")
    return None if layers is None else (weight, norm.eps, layers[0])


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody wants to be told when the module is called, or has put another function in its place."""
    own = module.__dict__
    is_watched = own["_forward_hooks"] or own["_forward_pre_hooks"]
    return not is_watched and "forward" not in own and "_compiled_call_impl" not in own


def is_plain(tensor: Tensor | None) -> bool:
    """Whether a kernel may read it where it lies: no subclass (as quantised weights are), on the CPU, without gaps."""
    if tensor is None:
        return True
    return type(tensor) in (Parameter, Tensor) and tensor.is_cpu and tensor.is_contiguous()


def _layers(part: nn.Module, *names: str) -> Any:
    """The weights of linear layers as the kernels read them; None if one is of another kind."""
    found = []
    for name in names:
        module: Any = part._modules[name]
        kind = type(module)
        held = module._parameters if kind is nn.Linear else module._buffers
        if kind not in (nn.Linear, Int8, Int4) or not is_untouched(module):
            return None
        if not held.keys() >= {"bias", "codes" if kind is Int4 else "weight"}:
            return None  # what is missing is computed when the layer is called, or is no parameter
        factors, group = None, 0
        if kind is Int4:
            if module.input_bits is not None:
                return None
            weight, factors, group = held["codes"], held["factors"], module.group
        else:
            weight = held["weight"]
        if kind is nn.Linear and weight.dtype not in KINDS:
            return None
        if not all(map(is_plain, held.values())):
            return None
        found.append((weight, as_read(held.get("scale")), as_read(held["bias"]), factors, group))
    return tuple(found)


def as_read(numbers: Tensor | None) -> Tensor | None:
    """Factors or a bias in a dtype that kernels read."""
    return numbers if numbers is None or numbers.dtype in KINDS else numbers.float()
