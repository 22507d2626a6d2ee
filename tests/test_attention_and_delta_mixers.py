"""Attention and delta-rule mixers against other implementations and the papers' equations, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seqmix.core.errors import ConfigError, ShapeError
from seqmix.core.numerics import relative_error
from seqmix.core.state import num_bytes
from seqmix.layers.positions import rotate
from seqmix.mixers import MIXERS, Mixer
from seqmix.mixers._attention import Ragged

WIDTH, HEADS, LENGTH = 32, 2, 75
ROUNDING = 2e-6  # the others compute parts in float32 whatever the dtype


def tokens(length: int = LENGTH, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def randomise(module: nn.Module) -> nn.Module:
    """Moves every weight off its initial value, so that no factor is one or zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def build(name: str, **options: object) -> Mixer:
    mixer = MIXERS.get(name)
    return mixer(mixer.Config.from_dict({"width": WIDTH, "heads": HEADS, **options})).double()


def renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Their weights under our names."""
    assert set(names) == set(weights)
    return {ours: weights[theirs] for theirs, ours in names.items() if ours}


DELTA_NAMES = {
    "q_proj.weight": "query.weight",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "b_proj.weight": "strength.weight",
    "conv1d.weight": "convolution.weight",
    "o_norm.weight": "norm.weight",
    "o_proj.weight": "output.weight",
}


@pytest.mark.parametrize("negative", [False, True], ids=["positive", "negative_eigenvalues"])
def test_gated_delta_net_equals_the_one_of_olmo_hybrid(negative: bool) -> None:
    pytest.importorskip("transformers")
    from transformers.models.olmo_hybrid.configuration_olmo_hybrid import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = OlmoHybridConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=12,
        linear_value_head_dim=24,
        linear_allow_neg_eigval=negative,
    )
    theirs = randomise(OlmoHybridGatedDeltaNet(config, layer_idx=0))
    ours = build("gated_delta_net", negative_eigenvalues=negative)
    names = {
        "a_proj.weight": "decay.weight",
        "A_log": "decay_rate.A_log",
        "dt_bias": "decay_rate.dt_bias",
        "g_proj.weight": "gate.weight",
    }
    weights = renamed(theirs.state_dict(), DELTA_NAMES | names)
    weights["convolution.weight"] = weights["convolution.weight"].squeeze(1)
    ours.load_state_dict(weights)
    with torch.no_grad():
        assert relative_error(ours(tokens())[0], theirs(tokens())) < ROUNDING


def test_kimi_delta_attention_equals_the_one_of_kimi_linear() -> None:
    pytest.importorskip("transformers")
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_heads=HEADS,
        linear_head_dim=16,
        rms_norm_eps=1e-5,
    )
    theirs = KimiLinearDeltaAttention(config, layer_idx=0)
    for parameter in (theirs.forget_gate.A_log, theirs.forget_gate.dt_bias):
        nn.init.zeros_(parameter)  # the model sets them, not the layer
    randomise(theirs)
    ours = build("kimi_delta_attention")
    names = {
        "forget_gate.f_a_proj.weight": "decay.0.weight",
        "forget_gate.f_b_proj.weight": "decay.1.weight",
        "forget_gate.A_log": "decay_rate.A_log",
        "forget_gate.dt_bias": "decay_rate.dt_bias",
        "g_a_proj.weight": "gate.0.weight",
        "g_b_proj.weight": "gate.1.weight",
    }
    weights = renamed(theirs.state_dict(), DELTA_NAMES | names)
    weights["convolution.weight"] = weights["convolution.weight"].squeeze(1)
    weights["gate.1.bias"] = torch.zeros_like(ours.state_dict()["gate.1.bias"])
    for name in ("decay_rate.A_log", "decay_rate.dt_bias"):
        weights[name] = weights[name].reshape(ours.state_dict()[name].shape)
    ours.load_state_dict(weights)
    with torch.no_grad():
        assert relative_error(ours(tokens())[0], theirs(tokens())) < ROUNDING


@pytest.mark.parametrize("window", [None, 9])
def test_attention_equals_that_of_qwen3(window: int | None) -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    config = Qwen3Config(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        intermediate_size=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=8,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    model = randomise(Qwen3Model(config))
    theirs = model.layers[0].self_attn
    seen: dict[str, Tensor] = {}
    theirs.register_forward_hook(
        lambda module, args, kwargs, result: seen.update(x=kwargs["hidden_states"], y=result[0]),
        with_kwargs=True,
    )
    ours = build("attention", heads=4, key_heads=2, qk_norm=True, window=window)
    names = {
        "q_proj.weight": "query.weight",
        "k_proj.weight": "key.weight",
        "v_proj.weight": "value.weight",
        "q_norm.weight": "query_norm.weight",
        "k_norm.weight": "key_norm.weight",
        "o_proj.weight": "output.weight",
    }
    ours.load_state_dict(renamed(theirs.state_dict(), names))
    with torch.no_grad():
        model(inputs_embeds=tokens())
        assert relative_error(ours(seen["x"])[0], seen["y"]) < ROUNDING


def test_rwkv7_is_the_paper_s_recurrence() -> None:
    """Row vectors and S [V, K] as in the paper, one token and one head at a time."""
    mixer, x = randomise(build("rwkv7")), tokens(11, batch=1)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    with torch.no_grad():
        r, w, k, v, a, g = (x + mu * (before - x) for mu in mixer.mix)
        r, k, v = mixer.receptance(r), mixer.key(k), mixer.value(v)
        decay = torch.exp(-(torch.e**-0.5) * torch.sigmoid(mixer.decay(w) + mixer.decay_bias))
        rate = torch.sigmoid(mixer.rate(a) + mixer.rate_bias)
        replacement = k * (1 + (rate - 1) * mixer.replacement)
        size, outputs = WIDTH // HEADS, []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            S = x.new_zeros(size, size)
            for t in range(x.shape[1]):
                kappa = (k * mixer.removal)[0, t, part]
                kappa = (kappa / kappa.norm())[None]  # a row
                own = replacement[0, t, part]
                transition = decay[0, t, part].diag() - kappa.T @ (rate[0, t, part] * kappa)
                S = S @ transition + v[0, t, part][:, None] @ own[None]
                read = S @ r[0, t, part]
                normed = (read - read.mean()) / (read.var(unbiased=False) + 1e-5 * size).sqrt()
                normed = normed * mixer.norm.weight[part] + mixer.norm.bias[part]
                bonus = (r[0, t, part] * own * mixer.bonus[head]).sum() * v[0, t, part]
                outputs.append(normed + bonus)
        o = torch.stack(outputs).reshape(HEADS, x.shape[1], size).transpose(0, 1).flatten(1)
        wanted = mixer.output(o * mixer.gate(g)[0])
        assert relative_error(mixer(x)[0][0], wanted) < 1e-9


def test_a_rotation_keeps_lengths_and_makes_scores_depend_on_the_distance_alone() -> None:
    q, k = tokens(2, batch=1).unflatten(-1, (HEADS, -1)).split(1, dim=1)

    def score(query: int, key: int) -> Tensor:
        turned = rotate(q, torch.tensor([query])), rotate(k, torch.tensor([key]))
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=0, atol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 4), rtol=0, atol=1e-2)
    torch.testing.assert_close(rotate(q, torch.tensor([50])).norm(dim=-1), q.norm(dim=-1))
    with pytest.raises(ShapeError, match="even"):
        rotate(q[..., :5], torch.tensor([0]))


def test_a_windowed_state_is_bounded_and_keeps_the_first_tokens() -> None:
    mixer = build("windowed_attention", window=5, sinks=2)
    _, short = mixer(tokens(40))
    _, long = mixer(tokens(75))
    assert num_bytes(short) == num_bytes(long)
    assert short["keys"].shape[1] == 5 - 1 + 2
    assert long["keys"][:, :2].equal(mixer(tokens(75)[:, :2])[1]["keys"])


def test_decoding_appends_to_the_cache_in_place() -> None:
    mixer, x = build("attention"), tokens(60)
    with torch.no_grad():
        _, state = mixer(x[:, :40])
        _, state = mixer.step(x[:, 40], state)
        place = state["keys"].tensor.data_ptr()
        for t in range(41, 60):
            _, state = mixer.step(x[:, t], state)
    assert state["keys"].tensor.data_ptr() == place


def test_training_on_packed_texts_builds_no_padded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    unpack = Ragged.unpack
    monkeypatch.setattr(Ragged, "unpack", lambda self, x: calls.append(x) or unpack(self, x))
    y, state = build("attention")(tokens(batch=1), cu_seqlens=torch.tensor([0, 1, 3, LENGTH]))
    y.sum().backward()
    assert not calls
    assert state["keys"].tensor.shape[:2] == (3, LENGTH - 3)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 4, "key_heads": 3}, "key_heads=3 must divide heads=4"),
        ({"window": 0}, "window=0"),
        ({"sinks": 2}, "sinks=2 with window=None"),
        ({"heads": 32}, "cannot pair"),
        ({"rope_base": -1.0}, "rope_base"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_attention_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("attention", **fields)
