"""Causal tracing: which channel mixers give back an answer that a damaged subject has lost.

Noise on the embeddings of the subject's tokens makes the model forget the answer. In the damaged run, the outputs
of a block of neighbouring channel mixers at the subject's tokens are set to what they are in the undamaged run; the
more of the answer's probability comes back, the more these layers carry of the fact.

Meng et al. 2022 (arXiv:2202.05262), section 2, as used for unlearning by Agrawal and Huang 2025 (arXiv:2504.12996).
Axes: R rows, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqmix.core.errors import RangeError
from seqmix.models.channel_mixers import channel_mixers

NOISE = 3.0  # standard deviations of the embedding's entries (Meng et al. 2022)


@dataclass(frozen=True)
class Trace:
    """Probabilities of the answer; `restored[i]` is that with the layers from i on restored, a block of them."""

    clean: float
    corrupted: float
    restored: list[float]

    @property
    def effects(self) -> list[float]:
        """Indirect effects: what each block of layers gives back."""
        return [value - self.corrupted for value in self.restored]


@torch.no_grad()
def trace(
    model: Any,
    input_ids: Tensor,
    subject: tuple[int, int],
    answer: int,
    *,
    block: int = 6,
    samples: int = 2,
    seed: int = 0,
) -> Trace:
    """Traces the prompt `input_ids [T]`, whose next token should be `answer`, in one forward pass.

    `subject` is where the subject's tokens begin and end, `block` how many layers are restored together. Means
    over `samples` draws of the noise. Raises `RangeError` for places outside the prompt or too long a block.
    """
    layers = channel_mixers(model)
    start, stop = subject
    if not 0 <= start < stop <= len(input_ids):
        raise RangeError(f"subject={subject}, wanted a part of the {len(input_ids)} tokens.")
    if not 1 <= block <= len(layers):
        raise RangeError(f"block={block}, wanted 1 to {len(layers)}, the number of layers.")
    blocks = len(layers) - block + 1
    # Row 0 is undamaged; then `samples` rows that stay damaged, then as many for every block of layers.
    rows = 1 + samples * (1 + blocks)
    embedding = model.get_input_embeddings()
    noise = torch.randn(
        samples,
        stop - start,
        embedding.embedding_dim,
        generator=torch.Generator().manual_seed(seed),
    )
    noise *= NOISE * embedding.weight.std()

    def damage(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, start:stop] += noise.repeat(1 + blocks, 1, 1).to(output)
        return output

    def restore(layer: int) -> Callable[..., Tensor]:
        first = max(0, layer - block + 1)  # the first and the last block that this layer is in
        last = min(layer, blocks - 1)
        places = slice(1 + samples * (1 + first), 1 + samples * (2 + last))

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[places, start:stop] = output[0, start:stop]
            return output

        return hook

    hooks = [embedding.register_forward_hook(damage)]
    hooks += [layer.register_forward_hook(restore(i)) for i, layer in enumerate(layers)]
    try:
        logits = model(
            input_ids=input_ids.expand(rows, -1), use_cache=False, logits_to_keep=1
        ).logits
    finally:
        for hook in hooks:
            hook.remove()
    found = logits[:, -1].float().softmax(-1)[:, answer]
    means = found[1:].view(1 + blocks, samples).mean(-1).tolist()
    return Trace(found[0].item(), means[0], means[1:])


def mean_effects(traces: Sequence[Trace]) -> list[float]:
    """The indirect effect of every block of layers, the mean over several facts."""
    return torch.tensor([one.effects for one in traces]).mean(0).tolist()
