"""Causal tracing and unlearning: what is restored, what may change, and what is forgotten."""

import pytest
import torch
from torch import nn

from seqmix.analyze.causal_tracing import mean_effects, trace
from seqmix.core.errors import RangeError
from seqmix.models.channel_mixers import channel_mixers
from seqmix.models.hf import create
from seqmix.train.unlearn import (
    Retention,
    gradient_ascent,
    joint_objective,
    layers_of,
    only_trainable,
    unlearn,
)

PROMPT = torch.tensor([3, 4, 7, 1, 2])


def model(depth=4, layout="attention"):
    torch.manual_seed(0)
    made = create(layout, width=32, depth=depth, heads=2, vocabulary=24, channel="glu", tied=False)
    nn.init.normal_(made.model.head.weight, std=0.5)
    return made.eval()


def texts(first, *, seed):
    """Four prompts of which only the last token is scored."""
    ids = torch.randint(0, 24, (4, 6), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = torch.arange(first, first + 4)
    labels = ids.clone()
    labels[:, :-1] = -100
    return {"input_ids": ids, "labels": labels}


def loss(made, some):
    with torch.no_grad():
        return made(**some, use_cache=False).loss.item()


@pytest.fixture(scope="module")
def taught():
    made = model()
    forget, retain = texts(0, seed=1), texts(8, seed=2)
    unlearn(
        made,
        lambda m: m(**forget, use_cache=False).loss + m(**retain, use_cache=False).loss,
        list(made.parameters()),
        steps=60,
        learning_rate=3e-3,
    )
    assert max(loss(made, forget), loss(made, retain)) < 0.5
    return made, forget, retain


def test_the_undamaged_run_is_the_plain_model():
    made = model()
    answer = 5
    plain = made(input_ids=PROMPT[None], use_cache=False).logits[0, -1].softmax(-1)[answer]
    found = trace(made, PROMPT, (1, 3), answer, block=2)
    assert found.clean == pytest.approx(plain.item(), rel=1e-4)
    assert found.corrupted != pytest.approx(found.clean, rel=1e-3)
    assert len(found.restored) == len(found.effects) == 3


def test_a_block_restores_its_own_layers_and_no_others():
    """The same, one damaged run at a time, with the restored layers set by hand."""
    made = model()
    found = trace(made, PROMPT, (1, 3), 5, block=2, samples=1)
    layers, embedding = channel_mixers(made), made.get_input_embeddings()
    clean = []
    hooks = [layer.register_forward_hook(lambda m, i, o: clean.append(o)) for layer in layers]
    made(input_ids=PROMPT[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    noise = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0))

    def damage(module, inputs, output):
        output = output.clone()
        output[:, 1:3] += noise * 3 * embedding.weight.std()
        return output

    def restore(layer):
        def hook(module, inputs, output):
            output = output.clone()
            output[:, 1:3] = clean[layer][:, 1:3]
            return output

        return hook

    for first, expected in enumerate(found.restored):
        hooks = [embedding.register_forward_hook(damage)]
        hooks += [layers[i].register_forward_hook(restore(i)) for i in (first, first + 1)]
        logits = made(input_ids=PROMPT[None], use_cache=False).logits[0, -1]
        for one in hooks:
            one.remove()
        assert logits.softmax(-1)[5].item() == pytest.approx(expected, rel=1e-3)


def test_tracing_points_at_the_layer_that_carries_the_answer():
    """Only layer 2 of this model says anything, so restoring it alone brings the answer back."""
    made = model(layout="short_convolution")
    layers = channel_mixers(made)
    for i, block in enumerate(made.model.backbone.blocks):
        nn.init.zeros_(block.mixer.output.weight)
        if i != 2:
            nn.init.zeros_(layers[i].output.weight)
    nn.init.normal_(layers[2].output.weight, std=1.0)
    answer = int(made(input_ids=PROMPT[None], use_cache=False).logits[0, -1].argmax())
    found = [trace(made, PROMPT, (4, 5), answer, block=1, samples=8, seed=s) for s in range(4)]
    effects = mean_effects(found)
    assert max(range(4), key=effects.__getitem__) == 2
    assert effects[0] == effects[3] == pytest.approx(0, abs=1e-6)


def test_hooks_are_gone_afterwards():
    made = model()
    before = made(input_ids=PROMPT[None], use_cache=False).logits
    trace(made, PROMPT, (0, 2), 1, block=1)
    assert torch.equal(made(input_ids=PROMPT[None], use_cache=False).logits, before)


@pytest.mark.parametrize(("subject", "block"), [((2, 2), 1), ((3, 6), 1), ((0, 1), 0), ((0, 1), 5)])
def test_impossible_traces_are_refused(subject, block):
    with pytest.raises(RangeError, match="wanted"):
        trace(model(), PROMPT, subject, 0, block=block)


def test_the_weight_of_retention_rises_with_what_is_lost_and_is_clipped():
    retention = Retention()
    assert retention.weight(-5) == retention.weight(0) == 1.2  # 0.3 + 0.8 = 1.1 is below the least
    assert retention.weight(0.5) == pytest.approx(0.3 * 6**0.5 + 0.8)
    assert retention.weight(3) == retention.weight(1e9) == 2.8
    with pytest.raises(RangeError, match="least"):
        Retention(least=3.0)


def test_the_joint_objective_is_what_it_says(taught):
    made, forget, retain = taught
    objective = joint_objective(forget, retain)
    expected = 1.2 * loss(made, retain) - loss(made, forget)
    assert objective(made).item() == pytest.approx(expected, rel=1e-4)


def test_unlearning_forgets_more_than_it_loses_in_its_layers_alone(taught):
    made, forget, retain = taught
    before = {name: weight.clone() for name, weight in made.named_parameters()}
    lost, kept = loss(made, forget), loss(made, retain)
    unlearn(
        made,
        joint_objective(forget, retain),
        layers_of(made, [0, 1]),
        steps=12,
        learning_rate=3e-3,
    )
    changed = {n for n, w in made.named_parameters() if not torch.equal(w, before[n])}
    assert changed == {
        f"model.backbone.blocks.{i}.channel.{part}.weight"
        for i in (0, 1)
        for part in ("gate", "up", "output")
    }
    assert loss(made, forget) - lost > 1.0
    assert loss(made, retain) - kept < 0.5
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_(before[name])
    assert all(weight.requires_grad for weight in made.parameters())


def test_gradient_ascent_raises_the_loss(taught):
    made, forget, _ = taught
    before = {name: weight.clone() for name, weight in made.named_parameters()}
    start = loss(made, forget)
    steps = []
    unlearn(
        made,
        gradient_ascent(forget),
        list(made.parameters()),
        steps=3,
        learning_rate=1e-3,
        observe=steps.append,
    )
    assert loss(made, forget) > start
    assert steps == [1, 2, 3]
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_(before[name])


def test_only_chosen_weights_are_trainable_inside_and_all_as_before_outside():
    made = model()
    made.model.head.weight.requires_grad_(False)
    chosen = layers_of(made, [3])
    with only_trainable(made, chosen):
        assert sum(weight.requires_grad for weight in made.parameters()) == len(chosen)
    assert not made.model.head.weight.requires_grad
    assert made.model.embedding.weight.requires_grad


def test_layers_that_there_are_not_are_refused():
    with pytest.raises(RangeError, match="0 to 3"):
        layers_of(model(), [4])
