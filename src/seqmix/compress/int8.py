"""int8: the weights of linear layers, and the embedding, in 8 bits with a factor per output; no data is needed.

A table that embedding and head share stays one table. Convolutions, norms, decays, step sizes, skips and states keep
their precision: they are small, and their errors grow with the text. Weights that are no layer of their own (the
stacked experts of a mixture) stay too. `seqmix.linears.int8` says what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError
from seqmix.kernels import missing
from seqmix.linears import Replacement
from seqmix.linears.int8 import Int8
from seqmix.linears.tied import Tied
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.rebuild import replaced


@dataclass(frozen=True, kw_only=True)
class ToInt8(Transform):
    layers: str | None = None  # only layers whose place holds this, such as `channel`
    embedding: bool = True  # the embedding and the head too

    def fit(self, model: SeqmixForCausalLM, data: Calibration, work: Work) -> SeqmixForCausalLM:
        found = chosen(model, self.layers, embedding=self.embedding)
        layers: dict[str, Replacement] = {place: Int8.of(layer) for place, layer in found.items()}
        if "embedding" in layers and model.config.to_spec().tied:
            layers["head"] = Tied()
        work.notes["layers"] = len(layers)
        work.notes["product"] = missing() or "compiled"
        return replaced(model, layers)

    def needs(self, model: SeqmixForCausalLM, data: Calibration) -> Needs:
        found = chosen(model, self.layers, embedding=self.embedding)
        weights = sum(layer.weight.numel() for layer in found.values())
        return Needs(memory_mb=2 * weights / 1e6)


def chosen(
    model: SeqmixForCausalLM, layers: str | None, *, embedding: bool
) -> dict[str, nn.Linear | nn.Embedding]:
    """The dense layers to be rounded, by place. A tied head is left out, for its embedding stands for both.

    Raises `ConfigError` where there is none.
    """
    tied = model.config.to_spec().tied
    found: dict[str, nn.Linear | nn.Embedding] = {}
    for place, module in model.model.named_modules():
        if layers is not None and layers not in place:
            continue
        if place in ("embedding", "head"):
            wanted = embedding and not (tied and place == "head")
        else:
            wanted = type(module) is nn.Linear and not getattr(module, "only_read", False)
        if wanted and type(module) in (nn.Linear, nn.Embedding):
            found[place] = module
    if not found:
        raise ConfigError(
            f"layers={layers!r}: no dense layer is left there. Leave out this step, or choose other layers."
        )
    return found


TRANSFORM = ToInt8
