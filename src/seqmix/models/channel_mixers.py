"""Where the channel mixers of a language model are, in our models and in those of transformers."""

from __future__ import annotations

from torch import nn

from seqmix.channels import Channel
from seqmix.core.errors import ConfigError

FOREIGN = ".mlp"  # how LLaMA-like models, GPT-2 and GPT-NeoX call theirs
OUTPUTS = ("output", "down_proj")  # the last matrix, in ours and in LLaMA-like ones


def channel_mixers(model: nn.Module) -> list[nn.Module]:
    """The channel mixer of every block that has one, in order of depth; `ConfigError` where there is none."""
    own: list[nn.Module] = [module for module in model.modules() if isinstance(module, Channel)]
    found = own or [module for name, module in model.named_modules() if name.endswith(FOREIGN)]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no channel mixers. Give a model with such blocks, ours or LLaMA-like."
        )
    return found


def channel_outputs(model: nn.Module) -> list[nn.Linear]:
    """The last matrix of every channel mixer; `ConfigError` where one does not end in a linear layer."""
    layers = []
    for mixer in channel_mixers(model):
        last = next((getattr(mixer, name) for name in OUTPUTS if hasattr(mixer, name)), None)
        if not isinstance(last, nn.Linear):
            raise ConfigError(
                f"{type(mixer).__name__} does not end in one linear layer ({' or '.join(OUTPUTS)}). Give a model "
                "with `mlp`, `glu` or `squared_relu` blocks, or a LLaMA-like one."
            )
        layers.append(last)
    return layers
