"""Every task keeps every law, and deliberately broken tasks do not."""

import numpy as np
import pytest
import torch

from seqmix.core.errors import ConfigError, RangeError, ShapeError
from seqmix.data.packing import IGNORED
from seqmix.tasks import (
    TASKS,
    associative_recall,
    induction_heads,
    modular_arithmetic,
    parity,
    passkey,
)
from seqmix.tasks import permutation_composition as permutation
from seqmix.tasks._task import SPLITS
from seqmix.testing.tasks import TASK_LAWS, check_task, refuses, task_examples

EXAMPLES = {
    f"{name}-{example}": task
    for name in TASKS.names()
    for example, task in task_examples(TASKS.get(name))
}


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("law", TASK_LAWS, ids=lambda law: law.__name__)
def test_task(law, example):
    law(EXAMPLES[example])


# --- broken tasks


class ForgetsTheSeed(parity.Parity):
    def draw(self, random, rows, length):
        return super().draw(np.random.default_rng(0), rows, length)


class DrawsFromTheWorld(parity.Parity):
    def draw(self, random, rows, length):
        return super().draw(np.random.default_rng(), rows, length)


class ShiftsItsLabels(parity.Parity):
    def draw(self, random, rows, length):
        inputs, labels = super().draw(random, rows, length)
        return inputs, np.roll(labels, -1, axis=1)


class LeaksTheAnswer(induction_heads.InductionHeads):
    def draw(self, random, rows, length):
        inputs, labels = super().draw(random, rows, length)
        inputs[:, -2] = labels[:, -1]
        return inputs, labels


class OverstatesChance(associative_recall.AssociativeRecall):
    def chance(self):
        return 0.1


class FavoursOneAnswer(permutation.PermutationComposition):
    def draw(self, random, rows, length):
        inputs, labels = super().draw(random, rows, length)
        return inputs * (random.random((rows, 1)) < 0.5), labels * 0


class IgnoresTheSplit(parity.Parity):
    def batch(self, index, size, *, split="train", length=None):
        shift = 1000 if split == "test" else 0
        return super().batch(index + shift, size, split="train", length=length)


class ScoresNothing(parity.Parity):
    def draw(self, random, rows, length):
        inputs, labels = super().draw(random, rows, length)
        labels[0] = IGNORED
        return inputs, labels


class ApproximateOracle(modular_arithmetic.ModularArithmetic):
    """Evaluates from left to right, without precedence: right for most prefixes only."""

    def oracle(self, inputs):
        outputs = super().oracle(inputs)
        outputs[:, 6:] = 0
        return outputs


class LooksAhead(parity.Parity):
    """The parity of the whole row is asked at its first position."""

    def draw(self, random, rows, length):
        inputs, labels = super().draw(random, rows, length)
        asked = np.full_like(labels, IGNORED)
        asked[:, 0] = labels[:, -1]
        return inputs, asked

    def oracle(self, inputs):
        return super().oracle(inputs)[:, -1:].expand_as(inputs)


class HasAnIdleField(passkey.Passkey):
    """Digits are asked for and five are given."""

    def draw(self, random, rows, length):
        return passkey.Passkey().draw(random, rows, length)

    def oracle(self, inputs):
        return passkey.Passkey().oracle(inputs)


BROKEN = {
    ForgetsTheSeed: "index_seed_and_split_change_the_batch",
    DrawsFromTheWorld: "the_same_seed_gives_the_same_batch",
    ShiftsItsLabels: "the_oracle_is_exact",
    LeaksTheAnswer: "copying_the_input_is_no_answer",
    OverstatesChance: "guessing_scores_chance",
    FavoursOneAnswer: "guessing_scores_chance",
    IgnoresTheSplit: "training_and_test_share_no_example",
    ScoresNothing: "batches_have_the_stated_form",
    ApproximateOracle: "the_oracle_is_exact",
    LooksAhead: "answers_depend_on_the_past_only",
    HasAnIdleField: "every_field_has_an_effect",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_broken_task_breaks_its_law(kind):
    law = next(law for law in TASK_LAWS if law.__name__ == BROKEN[kind])
    with pytest.raises(AssertionError):
        law(kind())
    with pytest.raises(AssertionError, match=f"{kind.__name__} .* breaks"):
        check_task(kind)


# --- definitions, checked against something else


@pytest.mark.parametrize("modulus", [5, 7])
def test_modular_arithmetic_is_pythons(modulus):
    task = modular_arithmetic.TASK(modular_arithmetic.Config(modulus=modulus))
    inputs, labels = task.batch(0, 8)
    symbols = [*map(str, range(modulus)), *"+-*"]
    for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        text = [symbols[token] for token in row]
        for end in range(0, len(row), 2):
            assert answers[end] == eval("".join(text[: end + 1])) % modulus
        assert set(answers[1::2]) == {IGNORED}


@pytest.mark.parametrize(
    ("group", "order", "commutes"),
    [("s3", 6, False), ("s4", 24, False), ("s5", 120, False), ("a3", 3, True), ("a4", 12, False),
     ("a5", 60, False)],
)  # fmt: skip
def test_product_table_is_a_group(group, order, commutes):
    table = permutation.product_table(group)
    everything = np.arange(order)
    assert table.shape == (order, order)
    assert (table[0] == everything).all()
    assert (table[:, 0] == everything).all()
    assert (np.sort(table, axis=1) == everything).all()
    assert (np.sort(table, axis=0) == everything[:, None]).all()
    assert (table[table] == table[:, table]).all()  # (a b) c = a (b c)
    assert (table == table.T).all() == commutes


def test_associative_recall_asks_each_key_once_behind_the_pairs():
    task = associative_recall.TASK()
    inputs, labels = task.batch(0, 200)
    pairs = task.config.pairs
    for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        known = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(known) == pairs
        asked = {row[t]: answers[t] for t in range(len(row)) if answers[t] != IGNORED}
        assert asked == known
        assert all(token == 0 or token in known for token in row[2 * pairs :])


def test_gaps_follow_the_power_law():
    config = associative_recall.Config(pairs=1, length=66, vocabulary=16)
    # Drawn before the split, which tilts the frequencies in a space as small as this one.
    _, labels = associative_recall.TASK(config).draw(np.random.default_rng(0), 20_000, 66)
    places = (labels != IGNORED).argmax(axis=1)
    counts = torch.from_numpy(np.bincount((places - 2) // 2, minlength=32))
    wanted = torch.arange(1, 33.0) ** (config.power - 1)
    wanted *= 20_000 / wanted.sum()
    chi_squared = ((counts - wanted) ** 2 / wanted).sum().item()
    assert chi_squared < 62  # 31 degrees of freedom: exceeded by chance once in a thousand


def test_passkey_reads_as_text():
    task = passkey.TASK()
    inputs, labels = task.batch(0, 50)
    for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        text = bytes(row).decode()
        number = bytes(answers[-5:]).decode()
        assert text.count(f"The number is {number}. Keep it. ") == 1
        assert text.endswith(f"What was it? The number is {number[:-1]}")
        start = text.index("The number is")
        assert start == 0 or text[:start].endswith(". ")


def test_chance_counts_that_products_favour_zero():
    config = modular_arithmetic.Config(operators="*", scored="last", length=41)
    assert modular_arithmetic.TASK(config).chance() == pytest.approx(1 - (4 / 5) ** 21)


def test_accuracy_counts_scored_positions_only():
    labels = torch.tensor([[IGNORED, 1, 2], [3, IGNORED, 4]])
    predictions = torch.tensor([[1, 1, 0], [3, 3, 0]])
    accuracy = parity.TASK.accuracy
    assert accuracy(predictions, labels) == 0.5
    with pytest.raises(ShapeError, match="argmax"):
        accuracy(torch.zeros(2, 3, 5), labels)
    with pytest.raises(RangeError, match="nothing to score"):
        accuracy(predictions, torch.full_like(labels, IGNORED))


@pytest.mark.parametrize(
    ("task", "fields", "says"),
    [
        ("parity", {"scored": "all"}, "every, last"),
        ("parity", {"seed": -1}, "seed=-1"),
        ("parity", {"lenght": 3}, "Did you mean 'length'"),
        ("modular_arithmetic", {"operators": "+/"}, "operators"),
        ("modular_arithmetic", {"modulus": 1}, "modulus=1"),
        ("permutation_composition", {"group": "s9"}, "s3, s4, s5"),
        ("associative_recall", {"pairs": 64}, "too few keys.*at least 130"),
        ("associative_recall", {"filler": "noise"}, "blank, random"),
        ("associative_recall", {"power": 0.0}, "power=0.0"),
        ("selective_copying", {"vocabulary": 3}, "vocabulary=3"),
        ("induction_heads", {"vocabulary": 2}, "vocabulary=2"),
        ("passkey", {"digits": 0}, "digits=0"),
    ],
)
def test_impossible_configuration_is_explained(task, fields, says):
    with pytest.raises(ConfigError, match=says):
        TASKS.get(task).Config.from_dict(fields)


def test_length_that_cannot_hold_an_example_is_explained():
    with pytest.raises(RangeError, match=r"AssociativeRecall: length=8, wanted at least 32"):
        associative_recall.TASK(associative_recall.Config(length=8))


class OneExample(parity.Parity):
    def draw(self, random, rows, length):
        zeros = np.zeros((rows, length), dtype=np.int64)
        return zeros, zeros


def test_too_small_a_space_is_explained():
    refusals = [refuses(OneExample(), index=0, size=4, split=split) for split in SPLITS]
    assert refusals.count(None) == 1  # the one example is in one of the splits
    assert "too few different examples" in "".join(filter(None, refusals))
