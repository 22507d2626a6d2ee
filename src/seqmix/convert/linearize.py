"""Attention layers of a pretrained model as layers of another causal mixer, taught layer by layer.

    student = linearized(model, "liger", blocks)       weights with the same role are carried over
    transfer(student, model, blocks, windows, ...)     every new mixer learns what the old one gave

In the transfer, layer l of the student sees what the same layer of the model sees, so that all layers learn at once and
none by the errors of another:

    loss = sum_l |new_l(x_l) - old_l(x_l)|^2 / |old_l(x_l)|^2,     x_l: inputs of the old mixer l in the whole model

Zhang et al. 2024 (LoLCATs, arXiv:2410.10254), section 3.2: learning the outputs of attention layers. What stands for
queries, keys and values in a state space (C, B and x): Wang et al. 2024 (Mamba-in-Llama, arXiv:2408.15237), section 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seqmix.core.errors import ConfigError
from seqmix.layers.convolution import ShortConvolution
from seqmix.linears import Replacement
from seqmix.mixers import MIXERS, Mixer
from seqmix.mixers._attention import AttentionConfig, AttentionMixer
from seqmix.mixers._projection import ProjectionConfig
from seqmix.models.backbone import build_mixer
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.layout import parse_part
from seqmix.models.rebuild import rebuild
from seqmix.train.folder import RunFolder
from seqmix.train.loop import run
from seqmix.train.plan import Plan, Record

RENAMED = {"receptance": "query"}  # roles that a mixer has another name for


def attention_blocks(model: SeqmixForCausalLM) -> list[int]:
    """Numbers of the blocks whose mixer is causal attention over all earlier tokens."""
    return [
        number
        for number, block in enumerate(model.model.backbone.blocks)
        if isinstance(block.mixer, AttentionMixer)
        and block.mixer.causal
        and block.mixer.config.kept is None
    ]


def mixer_of(model: SeqmixForCausalLM, number: int) -> Mixer:
    """The mixer of a block that has one."""
    mixer = model.model.backbone.blocks[number].mixer
    assert isinstance(mixer, Mixer)
    return mixer


def linearized(model: SeqmixForCausalLM, to: str, blocks: Sequence[int]) -> SeqmixForCausalLM:
    """A copy of `model` whose attention in `blocks` is the mixer `to`, such as `mamba2` or `liger(window=32)`.

    The new mixer has the heads of the old one. Weights with the same role and shape are carried over (keys and values
    that heads share are repeated where the mixer shares none), and short convolutions begin as the identity; the
    rest is new. It then needs `transfer`. Raises `ConfigError` for a mixer that is not causal and for other blocks than
    those of `attention_blocks`.
    """
    part = parse_part(to)
    kind = MIXERS.get(part.name)
    if not kind.causal or part.name == "attention":
        raise ConfigError(f"to={to!r}, wanted a causal mixer other than attention.")
    if unknown := sorted({*blocks} - {*attention_blocks(model)}):
        raise ConfigError(
            f"blocks={unknown} have no attention over all earlier tokens. Wanted some of {attention_blocks(model)}."
        )
    spec = model.config.to_spec()
    entries, tensors, replaced = spec.entries(), model.state_dict(), dict(spec.replaced)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for number in blocks:
            old = mixer_of(model, number)
            assert isinstance(old, AttentionMixer)
            made = dataclasses.replace(part, options=shape_of(old.config, kind) | {**part.options})
            new = build_mixer(made, spec)
            assert new is not None
            carry_over(old, new)
            entries[number] = dataclasses.replace(entries[number], mixer=made)
            place = f"backbone.blocks.{number}.mixer."
            replaced = {name: how for name, how in replaced.items() if not name.startswith(place)}
            tensors = {k: v for k, v in tensors.items() if not k.startswith(f"model.{place}")}
            tensors |= {f"model.{place}{name}": value for name, value in new.state_dict().items()}
    spec = dataclasses.replace(spec.with_entries(entries), replaced=replaced)
    return rebuild(model, spec, tensors)


def with_attention_of(
    student: SeqmixForCausalLM, model: SeqmixForCausalLM, blocks: Sequence[int]
) -> SeqmixForCausalLM:
    """A copy of `student` in which the mixers of `blocks` are again those of `model`."""
    spec, whole = student.config.to_spec(), model.config.to_spec()
    entries, tensors, replaced = spec.entries(), student.state_dict(), dict(spec.replaced)
    for number in blocks:
        entries[number] = dataclasses.replace(entries[number], mixer=whole.entries()[number].mixer)
        place = f"backbone.blocks.{number}.mixer."
        replaced |= {k: how for k, how in whole.replaced.items() if k.startswith(place)}
        tensors = {k: v for k, v in tensors.items() if not k.startswith(f"model.{place}")}
        theirs = model.state_dict().items()
        tensors |= {k: v for k, v in theirs if k.startswith(f"model.{place}")}
    spec = dataclasses.replace(spec.with_entries(entries), replaced=replaced)
    return rebuild(student, spec, tensors)


def shape_of(config: AttentionConfig, kind: type[Mixer]) -> dict[str, Any]:
    """The options that give a mixer of this kind the heads of an attention layer, and all that it shares with it."""
    if issubclass(kind.Config, ProjectionConfig):
        shared = [*ProjectionConfig.fields(), *({"scale"} & {*kind.Config.fields()})]
        plain = AttentionConfig(width=config.width, heads=config.heads)
        given = {name: getattr(config, name) for name in shared if name != "width"}
        return {k: v for k, v in given.items() if k == "heads" or v != getattr(plain, k)}
    assert config.head_width is not None
    ratio = config.heads * config.head_width / config.width
    options: dict[str, Any] = {
        "heads": config.heads,
        "key_ratio": ratio,
        "value_expansion": 1.0,  # values as wide as keys
        "value_ratio": 1.0,
    }
    if {"groups", "state_width"} <= {*kind.Config.fields()}:  # a state space with heads
        groups = {"groups": config.heads, "state_width": config.head_width, "expansion": ratio}
        options |= groups
    return {name: value for name, value in options.items() if name in kind.Config.fields()}


@torch.no_grad()
def carry_over(old: AttentionMixer, new: Mixer) -> None:
    """Copies into `new` what it has in common with `old`, in place."""
    for module in new.modules():
        if isinstance(module, ShortConvolution):
            module.weight.zero_()
            module.weight[:, -1] = 1.0
    known = _dense(old)
    heads, groups = old.config.heads, old.config.groups
    known |= {
        f"{name} of every head": value.unflatten(0, (groups, -1))
        .repeat_interleave(heads // groups, dim=0)
        .flatten(0, 1)
        for name, value in known.items()
        if name.split(".")[0] in ("key", "value")
    }
    for name, tensor in new.state_dict().items():
        role, _, rest = name.partition(".")
        name = f"{RENAMED.get(role, role)}.{rest}"
        for candidate in (name, f"{name} of every head"):
            if candidate in known and known[candidate].shape == tensor.shape:
                tensor.copy_(known[candidate])
    if {"groups", "state_width"} <= {*new.Config.fields()}:
        c = new.config
        maps = c.groups * c.state_width
        _, x, B, C, _ = new.get_parameter("input.weight").split(
            [c.channels, c.channels, maps, maps, c.heads]
        )
        names = ("value.weight of every head", "key.weight of every head", "query.weight")
        for part, name in zip((x, B, C), names, strict=True):
            if part.shape == known[name].shape:
                part.copy_(known[name])


def _dense(mixer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a mixer, those of replaced layers as a dense layer would have them."""
    tensors: dict[str, Tensor] = {}
    for name, child in mixer.named_children():
        dense = child.to_dense() if isinstance(child, Replacement) else child
        tensors |= {f"{name}.{inner}": value for inner, value in dense.state_dict().items()}
    return tensors


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside the block, models are in evaluation mode."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


@contextmanager
def _watched(
    model: SeqmixForCausalLM, blocks: Sequence[int], see: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside the block, every call of a mixer gives its number, its input and its output to `see`."""

    def hook(number: int) -> Any:
        return lambda module, inputs, outputs: see(number, inputs[0], outputs[0])

    handles = [mixer_of(model, number).register_forward_hook(hook(number)) for number in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inputs_and_outputs(
    model: SeqmixForCausalLM, blocks: Sequence[int], ids: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """What the mixers of `blocks` read and give, both [B, T, D], on windows [B, T]."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def see(number: int, x: Tensor, y: Tensor) -> None:
        found[number] = (x, y)

    with _watched(model, blocks, see):
        model.model.backbone(model.model.embedding(ids))
    return found


def relative_errors(
    student: SeqmixForCausalLM, pairs: Mapping[int, tuple[Tensor, Tensor]]
) -> dict[int, Tensor]:
    """|new(x) - y|^2 / |y|^2 of the student's mixers for `inputs_and_outputs`."""
    return {
        number: (mixer_of(student, number)(x)[0] - y).square().sum()
        / y.square().sum().clamp_min(1e-12)
        for number, (x, y) in pairs.items()
    }


@torch.no_grad()
def transfer_errors(
    student: SeqmixForCausalLM, model: SeqmixForCausalLM, blocks: Sequence[int], windows: Tensor
) -> dict[int, float]:
    """The mean over windows [N, T] of `relative_errors`, per block."""
    found = [
        relative_errors(student, inputs_and_outputs(model, blocks, ids[None])) for ids in windows
    ]
    return {number: float(np.mean([float(row[number]) for row in found])) for number in blocks}


def transfer(
    student: SeqmixForCausalLM,
    model: SeqmixForCausalLM,
    blocks: Sequence[int],
    windows: Tensor,
    *,
    steps: int,
    batch: int = 1,
    learning_rate: float = 1e-3,
    seed: int = 0,
    folder: RunFolder | None = None,
    progress: bool = False,
) -> Record:
    """Trains the mixers of `blocks` in place on what those of `model` give, `batch` of the windows [N, T] a step.

    One pass of `model` teaches all of them, and no gradient passes through it. With `folder`, a run that was stopped
    goes on. Windows are drawn in an order that changes with every pass over them.
    """
    student.requires_grad_(False)
    for number in blocks:
        mixer_of(student, number).requires_grad_(True)
    plan = Plan(
        steps=steps,
        tokens_per_step=batch * windows.shape[1],
        learning_rate=learning_rate,
        weight_decay=0.0,
        clip=0.0,  # the layers have nothing to do with one another
        seed=seed,
        progress=progress,
    )

    def loss(trained: Any, inputs: dict[str, Tensor]) -> Tensor:
        pairs = inputs_and_outputs(model, blocks, inputs["input_ids"])
        return torch.stack(list(relative_errors(trained, pairs).values())).sum()

    try:
        with _evaluating(model):
            return run(student, in_turns(windows, batch, seed), plan, folder=folder, loss=loss)
    finally:
        student.requires_grad_(True)


def in_turns(windows: Tensor, batch: int, seed: int) -> Callable[[int], dict[str, Tensor]]:
    """Batch i of the windows [N, T], in an order that changes with every pass over them."""

    def place(index: int) -> int:
        turn, offset = divmod(index, len(windows))
        return int(np.random.default_rng([seed, turn]).permutation(len(windows))[offset])

    def draw(index: int) -> dict[str, Tensor]:
        rows = windows[[place(index * batch + row) for row in range(batch)]]
        return {"input_ids": rows, "labels": rows}

    return draw


@torch.no_grad()
def damages(
    student: SeqmixForCausalLM, model: SeqmixForCausalLM, blocks: Sequence[int], windows: Tensor
) -> dict[int, float]:
    """How much the model's predictions change, per block, when only its mixer is the student's.

    The mean over the tokens of windows [N, T] of KL(p || q) in nats, p the next-token distribution of `model`.
    """
    with _evaluating(model, student):
        rows = [_damages(student, model, blocks, ids) for ids in windows]
    return {number: float(np.mean([row[number] for row in rows])) for number in blocks}


def _damages(
    student: SeqmixForCausalLM, model: SeqmixForCausalLM, blocks: Sequence[int], ids: Tensor
) -> dict[int, float]:
    """`damages` of one window [T]."""
    inside, new = model.model, student.model.backbone.blocks
    x: dict[int, Tensor] = {}
    found: dict[int, float] = {}

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x[len(x)] = inputs[0]

    handles = [block.register_forward_pre_hook(see) for block in inside.backbone.blocks]
    try:
        p = inside(ids[None])[0].float().log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    for number in blocks:
        y, _ = new[number](x[number])
        for block in inside.backbone.blocks[number + 1 :]:
            y, _ = block(y)
        q = inside.head(inside.backbone.leave(y)).float().log_softmax(-1)
        found[number] = float((p.exp() * (p - q)).sum(-1).mean())
    return found
