"""Mixers against another implementation of the same paper, with the same weights, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seqmix.core.numerics import relative_error
from seqmix.mixers import MIXERS

pytest.importorskip("transformers")

WIDTH, LENGTH = 32, 75
ROUNDING = 2e-6  # the others compute parts in float32 whatever the dtype


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, LENGTH, WIDTH, generator=generator, dtype=torch.float64)


def randomise(module: nn.Module) -> nn.Module:
    """Moves every weight off its initial value, so that no factor is one or zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def copied(name: str, options: dict[str, object], weights: dict[str, Tensor]) -> nn.Module:
    mixer = MIXERS.get(name)
    module = mixer(mixer.Config.from_dict({"width": WIDTH, **options})).double()
    module.load_state_dict(weights)
    return module


def test_mamba() -> None:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=WIDTH, state_size=8, num_hidden_layers=1, vocab_size=8)
    theirs = randomise(MambaMixer(config, layer_idx=0))
    w = theirs.state_dict()
    ours = copied(
        "mamba",
        {"state_width": 8},
        {
            "input.weight": w["in_proj.weight"],
            "convolution.weight": w["conv1d.weight"].squeeze(1),
            "convolution.bias": w["conv1d.bias"],
            "selection.weight": w["x_proj.weight"],
            "step_size.weight": w["dt_proj.weight"],
            "step_bias": w["dt_proj.bias"],
            "A_log": w["A_log"],
            "D": w["D"],
            "output.weight": w["out_proj.weight"],
        },
    )
    assert relative_error(ours(tokens())[0], theirs(tokens())) < ROUNDING


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups: int) -> None:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=WIDTH,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=groups,
        chunk_size=16,
        num_hidden_layers=1,
        vocab_size=8,
    )
    theirs = randomise(Mamba2Mixer(config, layer_idx=0))
    w = theirs.state_dict()
    ours = copied(
        "mamba2",
        {"heads": 4, "state_width": 8, "groups": groups},
        {
            "input.weight": w["in_proj.weight"],
            "convolution.weight": w["conv1d.weight"].squeeze(1),
            "convolution.bias": w["conv1d.bias"],
            "step_bias": w["dt_bias"],
            "A_log": w["A_log"],
            "D": w["D"],
            "norm_weight": w["norm.weight"],
            "output.weight": w["out_proj.weight"],
        },
    )
    assert relative_error(ours(tokens())[0], theirs(tokens())) < ROUNDING


def test_short_convolution() -> None:
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    config = Lfm2Config(hidden_size=WIDTH, conv_L_cache=3, num_hidden_layers=1, vocab_size=8)
    theirs = randomise(Lfm2ShortConv(config, layer_idx=0))
    w = theirs.state_dict()
    ours = copied(
        "short_convolution",
        {},
        {
            "input.weight": w["in_proj.weight"],
            "convolution.weight": w["conv.weight"].squeeze(1),
            "output.weight": w["out_proj.weight"],
        },
    )
    assert relative_error(ours(tokens())[0], theirs(tokens())) < ROUNDING
