"""Attention layers as layers of other mixers: what is carried over, what is learnt, what stays, what goes on."""

import copy

import pytest
import torch

from seqmix.compress import Calibration, Work, parse_recipe, write_recipe
from seqmix.convert.linearize import (
    attention_blocks,
    damages,
    linearized,
    transfer,
    transfer_errors,
    with_attention_of,
)
from seqmix.core.errors import CheckpointError, ConfigError
from seqmix.mixers import MIXERS
from seqmix.models.hf import SeqmixForCausalLM, create

TARGETS = [name for name in MIXERS.names() if MIXERS.get(name).causal and name != "attention"]
BOUNDED = [name for name in TARGETS if name != "hyena"]  # which keeps its signal


def tiny(layout="3x[attention(key_heads=2)]", **fields):
    fields = {"width": 32, "heads": 4, "vocabulary": 50} | fields
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create(layout, **fields).eval()


def text(windows=8, length=24):
    generator = torch.Generator().manual_seed(1)
    return Calibration(windows=torch.randint(0, 50, (windows, length), generator=generator))


def fit(recipe, model, work=None):
    return parse_recipe(recipe)[0].fit(model, text(), work or Work())


@torch.no_grad()
def logits(model):
    return model(text().windows[:2, :20]).logits


@pytest.mark.parametrize("to", TARGETS)
def test_every_causal_mixer_learns_what_attention_gives(to, tmp_path):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    work = Work()
    made = fit(f"linearize:{to}(keep=0.34, transfer_tokens=144, learning_rate=0.001)", model, work)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    errors = work.notes["errors"].values()
    exact = to == "windowed_attention"  # a window longer than the text
    assert exact or sum(e["after"] for e in errors) < sum(e["before"] for e in errors)
    (kept,) = work.notes["kept"]
    assert work.notes["damage"][str(kept)] == max(work.notes["damage"].values())
    names = [entry.mixer.name for entry in made.config.to_spec().entries()]
    assert names == [to if number != kept else "attention" for number in range(3)]
    assert all(parameter.requires_grad for parameter in made.parameters())
    mixers = made.model.backbone.blocks
    if to in BOUNDED:
        linear = mixers[(kept + 1) % 3].mixer
        assert linear.state_bytes(10_000) == linear.state_bytes(1_000)
    made.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(SeqmixForCausalLM.from_pretrained(tmp_path)), logits(made), rtol=0, atol=0
    )


@pytest.mark.parametrize("to", TARGETS)
def test_weights_with_the_same_role_are_carried_over(to):
    model = tiny()
    old = model.model.backbone.blocks[1].mixer
    new = linearized(model, to, [1]).model.backbone.blocks[1].mixer
    every = old.value.weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    if to == "mamba2":
        x = new.input.weight[32:64]
        torch.testing.assert_close(x, every)
        torch.testing.assert_close(new.input.weight[96:128], old.query.weight)
    elif hasattr(new, "value") and to != "delta_product":
        expected = old.value.weight if len(new.value.weight) == 16 else every
        torch.testing.assert_close(new.value.weight, expected)
    if new.output.weight.shape == old.output.weight.shape:
        torch.testing.assert_close(new.output.weight, old.output.weight)


def test_a_wide_window_is_attention_and_every_option_of_a_layer_goes_over():
    layout = (
        "attention(key_heads=2, head_width=8, qk_norm=true, bias=true, output_bias=true, scale=0.5)"
    )
    model = tiny(f"2x[{layout}]")
    made = linearized(model, "windowed_attention(window=64)", [0, 1])
    torch.testing.assert_close(logits(made), logits(model), rtol=0, atol=0)
    assert transfer_errors(made, model, [0, 1], text().windows[:2]) == {0: 0.0, 1: 0.0}
    for to in ("hedgehog", "hedgehog(window=5)", "liger(window=5)", "lawcat", "gated_delta_net"):
        assert logits(linearized(model, to, [0])).isfinite().all()


def test_a_hedgehog_with_a_window_as_long_as_the_text_is_attention():
    model = tiny("2x[attention(key_heads=2, head_width=8, qk_norm=true, bias=true, scale=0.5)]")
    for window, equal in ((24, True), (8, False)):
        made = linearized(model, f"hedgehog(window={window})", [0, 1])
        assert made.model.backbone.blocks[0].mixer.config.scale == 0.5
        assert torch.allclose(logits(made), logits(model), atol=1e-5) == equal


def test_the_damage_is_what_replacing_one_layer_changes():
    model = tiny(tied=False)
    student = linearized(model, "liger(window=4)", [0, 1, 2])
    windows = text().windows[:3]
    found = damages(student, model, [0, 1, 2], windows)
    alone = with_attention_of(student, model, [0, 2])
    with torch.no_grad():
        p, q = (m(windows).logits.log_softmax(-1) for m in (model, alone))
    assert found[1] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    back = with_attention_of(student, model, [0, 1, 2])
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=0)


def test_a_layer_learns_as_if_it_were_alone():
    model = tiny().double()  # Adam makes much of what rounding changes
    together, alone = (linearized(model, "hedgehog", [0, 2]) for _ in range(2))
    how = {"steps": 5, "learning_rate": 1e-2}
    transfer(together, model, [0, 2], text().windows, **how)
    transfer(alone, model, [2], text().windows, **how)
    for name in ("query_features.weight", "value.weight"):
        learnt, expected = (
            m.model.backbone.blocks[2].mixer.get_parameter(name) for m in (together, alone)
        )
        torch.testing.assert_close(learnt, expected)
    untouched = together.model.backbone.blocks[2].channel.state_dict()
    for name, tensor in model.model.backbone.blocks[2].channel.state_dict().items():
        assert torch.equal(untouched[name], tensor)


def test_replaced_layers_give_their_dense_weights():
    model = parse_recipe("low_rank(layers=mixer)")[0].fit(tiny(), text(), Work())
    made = linearized(model, "liger", [0, 1])
    assert {place.split(".")[2] for place in made.config.to_spec().replaced} == {"2"}
    dense = model.model.backbone.blocks[0].mixer.query.to_dense().weight
    torch.testing.assert_close(made.model.backbone.blocks[0].mixer.query.weight, dense)
    back = with_attention_of(made, model, [0, 1])
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=0)


def test_only_attention_over_all_earlier_tokens_is_taken():
    model = tiny("attention, attention(window=8), mamba2, none, liger")
    assert attention_blocks(model) == [0]
    with pytest.raises(ConfigError, match=r"blocks=\[2\]"):
        linearized(model, "liger", [0, 2])
    with pytest.raises(ConfigError, match="causal mixer other than attention"):
        linearized(model, "bidirectional_attention", [0])
    with pytest.raises(ConfigError, match="its state does not grow"):
        fit("linearize", tiny("2x[mamba2]"))
    assert (
        fit("linearize:liger(keep=0, transfer_tokens=0)", model)
        .config.to_spec()
        .layout.startswith("liger(")
    )


def test_a_finished_transfer_is_not_repeated_and_another_is_refused(tmp_path):
    model = tiny()
    recipe = "linearize:hedgehog(transfer_tokens=72)"
    first = fit(recipe, model, Work(folder=tmp_path))
    work = Work(folder=tmp_path)
    again = fit(recipe, model, work)
    torch.testing.assert_close(logits(again), logits(first), rtol=0, atol=0)
    assert work.notes["transfer"]["tokens"] == 72
    with pytest.raises(CheckpointError, match="transfer_tokens"):
        fit("linearize:hedgehog(transfer_tokens=96)", model, Work(folder=tmp_path))


def test_blocks_that_stay_can_be_named_and_recipes_hold_options_of_the_mixer():
    work = Work()
    made = fit("linearize:mamba2(keep=0+2, transfer_tokens=24)", tiny(), work)
    assert work.notes["kept"] == [0, 2]
    assert [e.mixer.name for e in made.config.to_spec().entries()] == [
        "attention",
        "mamba2",
        "attention",
    ]
    (step,) = parse_recipe("linearize(to=liger(window=5, temperature=8.0), keep=1+)")
    assert (step.to, step.keep) == ("liger(window=5, temperature=8.0)", "1+")
    assert parse_recipe(write_recipe([step])) == [step]
    for wrong in ("keep=1.0", "keep=7+", "transfer_tokens=-1", "learning_rate=0.0"):
        with pytest.raises(ConfigError, match="linearize: "):
            fit(f"linearize({wrong})", tiny())


def test_needs_are_said_before():
    step = parse_recipe("linearize(transfer_tokens=1000, damage_tokens=10)")[0]
    needs = step.needs(tiny(), text())
    assert needs.forward_tokens == 1000 + 2 * 10
    assert 0 < needs.training_tokens < 1000
