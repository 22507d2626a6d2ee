"""fold_norms: batch norms go into the linear layers that read them, so that inference has no norms at all.

    W (a * x + b) + c = (W diag(a)) x + (W b + c)

For models trained with norm='progressive_batch', whose norms are y = a * x + b per channel in the end; outputs stay as
they are. The last norm stays as a factor and an offset per channel, for the head may share the embedding's weights.
Guo et al. 2024 (arXiv:2405.11582), section 3.2, eq. 7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqmix.compress._structure import Place, language_model, sublayer, sublayers
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.layers.progressive_norm import ProgressiveNorm
from seqmix.linears import Replacement
from seqmix.models.backbone import ModelSpec
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.layout import Part, parse_part
from seqmix.models.rebuild import rebuild

PROJECTIONS = ("query", "key", "value")
READERS: Mapping[
    str, tuple[str, ...]
] = {  # the only layers that read the input, with `bias` as an option
    **dict.fromkeys(
        (
            "attention",
            "windowed_attention",
            "bidirectional_attention",
            "prefix_attention",
            "linear_attention",
        ),
        PROJECTIONS,
    ),
    "glu": ("gate", "up"),
    "mlp": ("up",),
}


@dataclass(frozen=True, kw_only=True)
class FoldNorms(Transform):
    """Has no options."""

    @torch.no_grad()
    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        spec = model.config.to_spec()
        _check(spec)
        tensors, entries = dict(model.state_dict()), spec.entries()
        blocks = language_model(model).backbone.blocks
        for place in sublayers(model):
            number, part = place
            readers = _readers(model, place)
            a, b = _affine(getattr(blocks[number], f"{part}_norm"))
            stem = f"model.backbone.blocks.{number}.{part}"
            for name in list(tensors):
                if name.startswith(f"{stem}_norm."):
                    del tensors[name]
            for name in readers:
                weight, bias = f"{stem}.{name}.weight", f"{stem}.{name}.bias"
                offset = tensors[weight] @ b
                tensors[bias] = tensors[bias] + offset if bias in tensors else offset
                tensors[weight] = tensors[weight] * a
            output: nn.Linear = sublayer(model, place).output  # type: ignore[assignment]
            given = getattr(entries[number], part) or parse_part(spec.channel)
            if part == "channel" and output.bias is None:  # whose biases come together
                tensors[f"{stem}.output.bias"] = output.weight.new_zeros(output.out_features)
            entries[number] = dataclasses.replace(
                entries[number], **{part: Part(given.name, {**given.options, "bias": True})}
            )
        last = "model.backbone.norm"
        a, b = _affine(language_model(model).backbone.norm)
        tensors = {n: t for n, t in tensors.items() if not n.startswith(last + ".")}
        tensors |= {f"{last}.weight": a, f"{last}.bias": b}
        folded = dataclasses.replace(spec.with_entries(entries), norm="none", last_norm="affine")
        work.notes["norms"] = len(sublayers(model))
        return rebuild(model, folded, tensors)

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        return Needs()


def _check(spec: ModelSpec) -> None:
    if spec.norm != "progressive_batch" or spec.last_norm is not None:
        raise ConfigError(
            f"fold_norms: norm={spec.norm!r} divides by what it reads, so no layer can take it over. Train the model "
            "with norm='progressive_batch', or leave out this step."
        )
    if spec.residual not in ("pre", "parallel") or spec.embedding_norm or spec.replaced:
        raise ConfigError(
            f"fold_norms: residual={spec.residual!r}, embedding_norm={spec.embedding_norm}, {len(spec.replaced)} "
            "layers replaced: norms can be folded where a dense linear layer follows each of them. Use residual='pre', "
            "and fold before other steps."
        )


def _readers(model: SeqmixForCausalLM, place: Place) -> tuple[str, ...]:
    module = sublayer(model, place)
    kind = type(module).__module__.rpartition(".")[2]
    if kind not in READERS or any(isinstance(layer, Replacement) for layer in module.modules()):
        raise ConfigError(
            f"fold_norms: the {place[1]} of block {place[0]} is {kind}, which does not only read its input by linear "
            f"layers with a bias. Norms are folded into {', '.join(READERS)}."
        )
    return READERS[kind]


def _affine(norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    assert isinstance(norm, ProgressiveNorm)
    return norm.affine()


TRANSFORM = FoldNorms
