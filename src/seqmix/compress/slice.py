"""SliceGPT: the residual stream is turned to its principal components, and the last of them are cut off.

An orthogonal Q does not change an RMS norm without weights: norm(Q^T x) = Q^T norm(x). So every norm's weights go into
the layers that read it, and around each mixer with readers W_i, output W_o and shortcut S

    W_i <- c W_i diag(w) Q,   W_o <- Q'^T W_o,   S <- Q'^T S Q,   c = sqrt(width / k),   eps <- c^2 eps

with Q [width, k] the first k principal components of what the norm before it gives, Q' those after it, and c for the
mean over k channels instead of all. Without slicing (remove=0) the outputs stay as they are. A LayerNorm becomes an RMS
norm once its mean is taken out of all that writes to the stream. Tied embeddings become two matrices: one table with
the best matrix between it and the head loses far more (SmolLM2-135M with a quarter cut off, Shakespeare: a loss of 7.1
instead of 4.4).
Ashkboos et al. 2024 (arXiv:2401.15024), sections 3.1-3.4, in float64. The authors' code takes the components of the
norms' inputs where the paper's eq. 7 takes their outputs, as we do.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqmix.compress._activations import first_inputs, linear_layers, watched
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.models.backbone import Block, ModelSpec
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.layout import Entry, Part, parse_part
from seqmix.models.rebuild import rebuild

MULTIPLE = 8  # widths are multiples of it, which products are fast with
PARTS = ("mixer", "channel")


@dataclass(frozen=True, kw_only=True)
class Slice(Transform):
    quick: ClassVar = {"tokens": 128}
    grows: ClassVar = "an embedding and a head that were one become two, and shortcuts come in"

    remove: float = 0.25  # share of the width
    tokens: int = 8192  # of the calibration text

    def __post_init__(self) -> None:
        if not 0 <= self.remove < 1:
            raise ConfigError(f"slice: remove={self.remove}, wanted at least 0 and below 1.")
        if self.tokens < 1:
            raise ConfigError(f"slice: tokens={self.tokens}, wanted at least 1.")

    @torch.no_grad()
    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        spec = model.config.to_spec()
        _check(spec)
        kept = sliced_width(spec.width, self.remove)
        made = copy.deepcopy(model).double().eval().model
        made.head.weight = nn.Parameter(made.head.weight.clone())  # no longer tied
        x = first_inputs(made, data.first(self.tokens).to(model.device))
        center: Callable[[Tensor], Tensor] = _unchanged
        if spec.norm == "layer":
            center = _centered
            x = x - x.mean(-1, keepdim=True)
        scale = (spec.width / kept) ** 0.5
        stored = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        basis = principal(x, kept, spec.norm_eps)
        stored["embedding.weight"] = center(made.embedding.weight.T).T @ basis
        if made.backbone.positions is not None:
            table = made.backbone.positions.table.weight
            stored["backbone.positions.table.weight"] = center(table.T).T @ basis
        for number, block in enumerate(work.track(made.backbone.blocks, "slicing")):
            for part in PARTS:
                module = getattr(block, part)
                if module is None:
                    continue
                place = f"backbone.blocks.{number}.{part}"
                norm, shortcut = getattr(block, f"{part}_norm"), getattr(block, f"{part}_shortcut")
                x = x @ basis @ basis.T  # what the slices before have left
                given = norm(x)
                reading = readers(module, given, place)
                for name in reading:
                    layer = module.get_submodule(name)
                    _fold(stored, f"{place}.{name}", layer, norm, scale * basis)
                y = _mixed(module, given)
                old = torch.eye(spec.width).to(x) if shortcut is None else shortcut.weight
                x = x @ old.T + center(y.transpose(-1, -2)).transpose(-1, -2)
                after = principal(x, kept, spec.norm_eps)
                output = module.output
                stored[f"{place}.output.weight"] = after.T @ center(output.weight)
                if output.bias is not None:
                    stored[f"{place}.output.bias"] = after.T @ center(output.bias)
                stored[f"{place}_shortcut.weight"] = after.T @ old @ basis
                stored[f"{place}_norm.weight"] = x.new_ones(kept)
                stored.pop(f"{place}_norm.bias", None)
                basis = after
        norm = made.backbone.norm
        _fold(stored, "head", made.head, norm, scale * basis)
        stored["backbone.norm.weight"] = x.new_ones(kept)
        stored.pop("backbone.norm.bias", None)
        cut = dataclasses.replace(
            spec.with_entries(_entries(spec, made.backbone.blocks, kept)),
            width=kept,
            norm="rms",
            norm_eps=spec.norm_eps * scale**2,
            shortcuts=True,
            tied=False,
        )
        work.notes["width"] = {"before": spec.width, "after": kept}
        tensors = {name: tensor.to(model.dtype) for name, tensor in stored.items()}
        return rebuild(model, cut, {f"model.{name}": tensor for name, tensor in tensors.items()})

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        width = model.config.hidden_size
        weights = 2 * 8 * model.num_parameters()  # a copy and the new tensors, in float64
        return Needs(
            forward_tokens=6 * self.tokens,
            memory_mb=(weights + 5 * 8 * self.tokens * width + 4 * 8 * width**2) / 2**20,
        )


def sliced_width(width: int, remove: float) -> int:
    """The width without the share `remove`, rounded down to a multiple of eight where it is that large."""
    kept = max(1, round(width * (1 - remove)))
    return kept if kept < MULTIPLE or kept == width else kept // MULTIPLE * MULTIPLE


def principal(x: Tensor, kept: int, eps: float) -> Tensor:
    """The first principal components [D, kept] of the tokens of x [N, T, D], each scaled to an RMS of one."""
    rows = x.flatten(0, -2)
    rows = rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
    vectors: Tensor = torch.linalg.eigh(rows.T @ rows).eigenvectors
    return vectors.flip(-1)[:, :kept]


def readers(module: nn.Module, x: Tensor, place: str) -> list[str]:
    """The linear layers of a mixer that read its input x.

    Raises `ConfigError` unless nothing else reads x, and a linear layer `output` gives the result: only then can the
    stream be turned without changing what the mixer computes.
    """
    layers = dict(linear_layers(module))
    window = x[:1].clone()
    seen: dict[str, Tensor] = {}
    with watched(layers, lambda name, given: seen.setdefault(name, given)):
        wanted = _mixed(module, window)
    found = [name for name, given in seen.items() if given.data_ptr() == window.data_ptr()]
    told = {name: layers[name](window) for name in found}

    def override(name: str) -> Callable[..., Tensor]:
        return lambda *_: told[name]

    handles = [layers[name].register_forward_hook(override(name)) for name in found]
    try:
        alone = bool(found) and torch.equal(_mixed(module, window.flip(1) * 2 + 1), wanted)
    finally:
        for handle in handles:
            handle.remove()
    if not alone:
        others = [name for name, p in module.named_parameters() if window.shape[-1] in p.shape]
        others = [name for name in others if name.rpartition(".")[0] not in (*found, "output")]
        raise ConfigError(
            f"slice: {place} reads its input otherwise than through linear layers (perhaps {others[:4]}), so it "
            "cannot be turned. Use a model without this mixer, or another transform."
        )
    if "output" not in seen or not torch.equal(layers["output"](seen["output"]), wanted):
        raise ConfigError(
            f"slice: the result of {place} is not that of a linear layer `output`, so it cannot be turned. "
            "Use a model without this mixer, or another transform."
        )
    return found


def _mixed(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


def _unchanged(rows: Tensor) -> Tensor:
    return rows


def _centered(rows: Tensor) -> Tensor:
    """[D, ...] minus the mean over D."""
    return rows - rows.mean(0, keepdim=True)


def _fold(stored: dict[str, Tensor], place: str, layer: Any, norm: Any, basis: Tensor) -> None:
    """Puts the norm before a layer, and the turn of its input, into the layer."""
    weight = layer.weight
    stored[f"{place}.weight"] = (weight * norm.weight) @ basis
    bias = getattr(norm, "bias", None)
    if bias is None or not bool(bias.any()):
        return
    if layer.bias is None:
        raise ConfigError(
            f"slice: the bias of the norm before {place} must go into that layer, which has none. "
            "Use a model with RMS norms, or with biases in its linear layers."
        )
    stored[f"{place}.bias"] = layer.bias + weight @ bias


def _check(spec: ModelSpec) -> None:
    if spec.residual != "pre" or spec.embedding_norm:
        raise ConfigError(
            f"slice: residual={spec.residual!r}, embedding_norm={spec.embedding_norm}: only streams that nothing but "
            "norms before the mixers touches can be turned. Use a model with residual='pre', or another transform."
        )
    if spec.head != "linear":
        raise ConfigError(
            f"slice: head={spec.head!r}, wanted 'linear', into which the last norm goes."
        )
    if spec.replaced:
        raise ConfigError(
            "slice: some layers of this model are replaced. Slice first: `slice:... | then the others`."
        )
    if spec.norm not in ("rms", "layer") or spec.last_norm not in (None, spec.norm):
        raise ConfigError(
            f"slice: norm={spec.norm!r}, last_norm={spec.last_norm!r}: only what rms and layer norms do stays the same "
            "when a stream is turned. Use another transform."
        )
    if spec.norm == "layer" and spec.shortcuts:
        raise ConfigError("slice: norm='layer' with shortcuts cannot be turned. Use RMS norms.")


def _entries(spec: ModelSpec, blocks: nn.ModuleList, width: int) -> list[Entry]:
    """The blocks at another width, with the inner sizes that they have."""
    default = parse_part(spec.channel)
    made = []
    for entry, block in zip(spec.entries(), blocks, strict=True):
        assert isinstance(block, Block)
        parts = []
        for part, module in ((entry.mixer, block.mixer), (entry.channel or default, block.channel)):
            same = module is None or module.config.width == width
            parts.append(part if same else _at_width(part, module.config, width))
        made.append(Entry(*parts))
    return made


def _at_width(part: Part, config: object, width: int) -> Part:
    fields = config.fields()  # type: ignore[attr-defined]
    if "hidden" in fields or "head_width" in fields:
        name = "hidden" if "hidden" in fields else "head_width"
        options = {name: getattr(config, name)}
    elif hasattr(config, "channels") and "expansion" in fields:
        options = {"expansion": config.channels / width}
        if "step_rank" in fields:
            options["step_rank"] = config.rank  # type: ignore[attr-defined]
    else:
        raise ConfigError(
            f"slice: {part.name} has no option that keeps its inner width when the width changes. "
            "Slice models of attention, mamba or mamba2, or take another transform."
        )
    return Part(part.name, dict(part.options) | options)


TRANSFORM = Slice
