"""Masked diffusion language models: their loss, the order in which they write, and reinforcement."""

from __future__ import annotations

import math

import pytest
import torch

from seqmix.analyze.decoding_order import global_causality, local_causality
from seqmix.core.errors import RangeError, ShapeError
from seqmix.generate.diffusion import denoise
from seqmix.models.encoder import SeqmixForMaskedLM
from seqmix.models.hf import create
from seqmix.objectives.masked_diffusion import Config, MaskedDiffusion
from seqmix.train import likelihood
from seqmix.train.reinforce import Group, advantages, clipped_loss, reinforce

WORDS, MASK, LENGTH = 6, 6, 4


def build():
    torch.manual_seed(0)
    model = SeqmixForMaskedLM.create(
        "bidirectional_attention", width=16, heads=2, vocabulary=WORDS + 1
    )
    return model.eval(), torch.randint(WORDS, (3, 2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_masks_of_a_batch_are_spread_over_all_times_and_weighted_by_them():
    objective = MaskedDiffusion(Config(mask_id=MASK, tokens=LENGTH))
    ids = torch.randint(WORDS, (4000, 6))
    inputs = objective.inputs(ids, generator())
    masked = inputs["input_ids"] == MASK
    assert not masked[:, :2].any()
    assert (inputs["weights"] > 0).equal(masked)
    shares = masked[:, 2:].sum(1).bincount().double() / len(ids)
    assert torch.allclose(shares, torch.full_like(shares, 1 / (LENGTH + 1)), atol=0.03)
    # Every place counts 1 / N in the mean.
    mean = inputs["weights"].mean(0)[2:]
    assert torch.allclose(mean, torch.full_like(mean, 1 / LENGTH), rtol=0.2)
    everything = MaskedDiffusion(Config(mask_id=MASK)).inputs(ids, generator())
    assert (everything["input_ids"] == MASK).any(0).all()


@torch.no_grad()
def test_the_surest_place_is_filled_first_and_stays():
    model, source = build()
    text = torch.cat([source, torch.full((3, LENGTH), MASK)], dim=1)
    for step in range(LENGTH):
        chances = model(text).logits[..., :MASK].softmax(-1).amax(-1)
        chances[text != MASK] = -1
        place = chances.argmax(1, keepdim=True)
        word = model(text).logits[..., :MASK].argmax(-1).gather(1, place)
        text = text.scatter(1, place, word)
        found = denoise(model, source, mask_id=MASK, length=LENGTH)
        assert (found.order.gather(1, place - 2) == step).all()
    assert found.tokens.equal(text[:, 2:])


def test_what_is_given_stays_and_several_places_are_filled_at_once():
    model, source = build()
    given = torch.tensor([[1, MASK, MASK, 2]]).expand(3, -1)
    found = denoise(model, source, mask_id=MASK, given=given, temperature=1.0, seed=1)
    assert found.tokens[:, [0, 3]].equal(given[:, [0, 3]])
    assert found.tokens.max() < MASK
    assert (found.order[:, [0, 3]] == -1).all()
    two = denoise(model, source, mask_id=MASK, length=LENGTH, tokens_per_step=2)
    assert two.order.sort(1).values.tolist() == [[0, 0, 1, 1]] * 3


def test_the_measures_of_an_order_are_those_of_its_definition():
    written = torch.tensor([[0, 1, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]])  # places, by step
    order = written.argsort(1)
    assert local_causality(order, 1).tolist() == pytest.approx([1, 2 / 3, 0])
    assert local_causality(order, 2).tolist() == pytest.approx([1, 0, 0])
    assert global_causality(order, 1).tolist() == pytest.approx([1, 0.5, 0.25])
    assert global_causality(order, 3).tolist() == pytest.approx([1, 1, 0.75])
    random = torch.rand(20000, 8, generator=generator()).argsort(1)
    harmonic = sum(1 / n for n in range(1, 9)) / 8
    assert global_causality(random).mean() == pytest.approx(harmonic, abs=0.01)
    assert local_causality(random).mean() == pytest.approx(1 / 8, abs=0.01)
    with pytest.raises(RangeError, match="order"):
        local_causality(torch.tensor([[0, 0, 1, 1]]))


@torch.no_grad()
def test_complementary_masks_count_every_token_once_and_vary_less():
    chance = torch.full((500, 1), 0.3)
    one, other = likelihood.complementary_masks(chance, 8, generator())
    assert (one ^ other).all()
    assert one.double().mean() == pytest.approx(0.3, abs=0.03)
    one, other = likelihood.independent_masks(chance, 8, generator())
    shares = [(one & other).double().mean().item(), one.double().mean().item()]
    assert shares == pytest.approx([0.21, 0.3], abs=0.03)
    model, source = build()
    answers = torch.randint(WORDS, (3, LENGTH))
    values = {}
    for masks in (likelihood.complementary_masks, likelihood.independent_masks):
        estimate, random = likelihood.Masked(mask_id=MASK, masks=masks), generator()
        drawn = [estimate(model, source, answers, random) for _ in range(120)]
        values[masks] = torch.stack(drawn).sum(2)
    coupled, independent = values.values()
    assert (coupled.var(0) < 0.7 * independent.var(0)).all()
    deviation = (independent.var(0) / 120).sqrt()
    assert ((coupled.mean(0) - independent.mean(0)).abs() < 5 * deviation).all()


@torch.no_grad()
def test_the_likelihood_of_a_causal_model_is_that_of_its_loss():
    torch.manual_seed(0)
    model = create("attention", width=16, heads=2, vocabulary=WORDS).eval()
    prompts, answers = torch.randint(WORDS, (2, 3)), torch.randint(WORDS, (2, LENGTH))
    labels = torch.cat([torch.full_like(prompts, -100), answers], dim=1)
    loss = model(torch.cat([prompts, answers], dim=1), labels=labels).loss
    found = likelihood.causal(model, prompts, answers, generator())
    assert found.shape == answers.shape
    assert -found.mean().item() == pytest.approx(loss.item(), rel=1e-5)


def test_advantages_are_relative_to_the_group_and_ratios_are_clipped():
    found = advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    assert found[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-3)
    assert found[1].tolist() == [0, 0, 0, 0]
    old = torch.zeros(1, 2)
    new = torch.tensor([[math.log(1.1), math.log(3.0)]], requires_grad=True)
    loss = clipped_loss(new, old, torch.tensor([2.0]), 0.2)
    assert loss.item() == pytest.approx(-(1.1 + 1.2))
    loss.backward()
    assert new.grad[0, 0] < 0
    assert new.grad[0, 1] == 0
    assert clipped_loss(new, old, torch.tensor([-2.0]), 0.2).item() == pytest.approx(1.1 + 3.0)


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_reinforcement_raises_the_reward(kind):
    """An answer is worth its share of ones, whatever the prompt."""
    model, source = build()
    estimate = likelihood.Masked(mask_id=MASK)

    def write(model, prompts, seed):
        return denoise(
            model, prompts, mask_id=MASK, length=LENGTH, temperature=1.0, seed=seed
        ).tokens

    if kind == "causal":
        torch.manual_seed(0)
        model = create("attention", width=16, heads=2, vocabulary=WORDS)
        estimate = likelihood.causal

        def write(model, prompts, seed):
            torch.manual_seed(seed)
            options = {"do_sample": True, "eos_token_id": None, "pad_token_id": 0}
            return model.generate(prompts, max_new_tokens=LENGTH, **options)[:, 2:]

    group = Group(prompts=2, answers=8, learning_rate=2e-2)

    def reward(prompts, answers):
        return (answers == 1).double().mean(1)

    history = reinforce(model, source, write, reward, estimate, steps=15, group=group)
    assert history[0] < 0.4
    assert sum(history[-3:]) / 3 > 0.8


def test_what_does_not_fit_is_refused():
    model, source = build()
    with pytest.raises(ShapeError, match="source"):
        denoise(model, source[0], mask_id=MASK, length=2)
    with pytest.raises(RangeError, match="exactly one"):
        denoise(model, source, mask_id=MASK)
    with pytest.raises(RangeError, match="tokens_per_step=0"):
        denoise(model, source, mask_id=MASK, length=2, tokens_per_step=0)
    with pytest.raises(RangeError, match="answers=1"):
        Group(answers=1)
