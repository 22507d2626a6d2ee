"""Laws of tasks: each takes a `Task` and raises AssertionError where it does not hold.

`check_task(TASK)` holds a task of your own to all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from seqmix.core.errors import RangeError, SeqmixError
from seqmix.data.packing import IGNORED
from seqmix.tasks._task import SPLITS, Batch, Task

Law = Callable[[Task[Any]], None]
MANY = 1024  # examples where a frequency is estimated


def batches_have_the_stated_form(task: Task[Any]) -> None:
    for length in {task.config.length, task.shortest, 2 * task.config.length + 1}:
        for split in SPLITS:
            batch = task.batch(3, 5, split=split, length=length)
            for name, ids in batch._asdict().items():
                assert ids.shape == (5, length), f"{name} have shape {list(ids.shape)}"
                assert ids.dtype == torch.int64, f"{name} are {ids.dtype}"
            assert batch.inputs.min() >= 0, "an input is negative"
            assert batch.inputs.max() < task.vocabulary, "an input is not in the vocabulary"
            scored = batch.labels != IGNORED
            assert scored.any(dim=1).all(), "a row has no scored position"
            answers = batch.labels[scored]
            assert task.answers.start <= answers.min(), "a label is not an answer"
            assert answers.max() < task.answers.stop, "a label is not an answer"
    assert task.answers.step == 1
    assert task.answers.stop <= task.vocabulary, "an answer is not in the vocabulary"


def the_same_seed_gives_the_same_batch(task: Task[Any]) -> None:
    again = type(task)(task.config)
    again.batch(0, 3)  # what was drawn before must not matter
    for split in SPLITS:
        assert_same(task.batch(7, 9, split=split), again.batch(7, 9, split=split))


def index_seed_and_split_change_the_batch(task: Task[Any]) -> None:
    other = type(task)(dataclasses.replace(task.config, seed=task.config.seed + 1))
    inputs = [
        task.batch(0, 64).inputs,
        task.batch(1, 64).inputs,
        task.batch(0, 64, split="test").inputs,
        other.batch(0, 64).inputs,
    ]
    for i, one in enumerate(inputs):
        assert not any(one.equal(two) for two in inputs[:i]), "two batches are the same"


def the_oracle_is_exact(task: Task[Any]) -> None:
    for length in (task.config.length, task.shortest, 2 * task.config.length + 1):
        for split in SPLITS:
            inputs, labels = task.batch(0, 64, split=split, length=length)
            score = task.accuracy(task.oracle(inputs.clone()), labels)
            assert score == 1.0, f"the oracle scores {score} at length {length} ({split})"


def answers_depend_on_the_past_only(task: Task[Any]) -> None:
    """Behind a scored position, another example goes on; the right answers up to there stay."""
    inputs, labels = task.batch(0, 64)
    for row in range(4):
        for position in (labels[row] != IGNORED).nonzero().flatten()[:8].tolist():
            changed = inputs.roll(1, dims=0)
            changed[:, : position + 1] = inputs[:, : position + 1]
            past = labels.clone()
            past[:, position + 1 :] = IGNORED
            score = task.accuracy(task.oracle(changed), past)
            assert score == 1.0, f"answers up to position {position} change with what follows it"


def guessing_scores_chance(task: Task[Any]) -> None:
    """The best constant answer scores as `chance` says, and random answers score no better."""
    _, labels = task.batch(0, MANY, split="test")
    answers = labels[labels != IGNORED] - task.answers.start
    count, chance = len(answers), task.chance()
    # The largest of many estimates lies sqrt(2 log answers) deviations high; three more for luck.
    deviation = math.sqrt(chance * (1 - chance) / count)
    tolerance = (3 + math.sqrt(2 * math.log(len(task.answers)))) * deviation + 1 / count
    best = torch.bincount(answers).max().item() / count
    assert abs(best - chance) <= tolerance, (
        f"the best constant answer scores {best:.4f}, and chance is stated as {chance:.4f}"
    )
    generator = torch.Generator().manual_seed(0)
    guesses = torch.randint(
        task.answers.start, task.answers.stop, labels.shape, generator=generator
    )
    score = task.accuracy(guesses, labels)
    assert score <= chance + tolerance, f"random answers score {score:.4f}, chance is {chance:.4f}"


def copying_the_input_is_no_answer(task: Task[Any]) -> None:
    """Neither the token at a scored position nor the one before it gives the answer away.

    The first position is left out: an answer there has nothing but its own token to depend on.
    """
    inputs, labels = task.batch(0, MANY)
    labels[:, 0] = IGNORED
    for distance in (0, 1):
        score = task.accuracy(inputs.roll(distance, dims=1), labels)
        assert score < task.chance() + 0.1, f"the token {distance} before scores {score:.3f}"


def training_and_test_share_no_example(task: Task[Any]) -> None:
    other = type(task)(dataclasses.replace(task.config, seed=task.config.seed + 1))
    for length in (task.shortest, task.config.length):
        train = rows(batch for i in range(4) for batch in [task.batch(i, MANY // 2, length=length)])
        test = rows(
            one.batch(i, MANY // 4, split="test", length=length)
            for one in (task, other)
            for i in range(4)
        )
        assert train, "no training examples"
        assert test, "no test examples"
        shared = len(train & test)
        assert not shared, f"{shared} examples of length {length} are in both splits"


def every_field_has_an_effect(task: Task[Any]) -> None:
    for field in type(task).Config.fields():
        tried = []
        for value in other_values(task, field):
            try:
                other = type(task)(dataclasses.replace(task.config, **{field: value}))
            except SeqmixError:
                continue
            tried.append(value)
            if not same(task.batch(0, 64), other.batch(0, 64)):
                break
        else:
            raise AssertionError(
                f"Config.{field} has no effect (tried {tried}). Remove it, or name a legal value "
                "that has one in the task's `examples`."
            )


def impossible_requests_are_refused(task: Task[Any]) -> None:
    requests: list[dict[str, Any]] = [
        {"split": "validate"},
        {"index": -1},
        {"size": 0},
        {"length": task.shortest - 1},
    ]
    for request in requests:
        (value,) = request.values()
        refusal = refuses(task, **{"index": 0, "size": 1, **request})
        assert refusal is not None, f"batch takes {request}"
        assert str(value) in refusal, f"the error does not name {request}: {refusal}"


TASK_LAWS: tuple[Law, ...] = (
    batches_have_the_stated_form,
    the_same_seed_gives_the_same_batch,
    index_seed_and_split_change_the_batch,
    the_oracle_is_exact,
    answers_depend_on_the_past_only,
    guessing_scores_chance,
    copying_the_input_is_no_answer,
    training_and_test_share_no_example,
    every_field_has_an_effect,
    impossible_requests_are_refused,
)


def check_task(kind: type[Task[Any]]) -> None:
    """Holds a task, in its default configuration and its `examples`, to every law.

    Raises AssertionError at the first law that it breaks.
    """
    for name, task in task_examples(kind):
        for law in TASK_LAWS:
            try:
                law(task)
            except Exception as error:
                raise AssertionError(
                    f"{kind.__name__} ({name}) breaks {law.__name__}: {error}"
                ) from error


def task_examples(kind: type[Task[Any]]) -> Iterator[tuple[str, Task[Any]]]:
    """The configurations in which a task is held to the laws, by name."""
    for name, fields in {"default": {}, **kind.examples}.items():
        yield name, kind(kind.Config(**fields))


def other_values(task: Task[Any], field: str) -> Iterator[Any]:
    """Other values for a field: those of the default and the examples, and a few numbers."""
    value = getattr(task.config, field)
    tried = [getattr(one.config, field) for _, one in task_examples(type(task))]
    if isinstance(value, int | float):
        tried += [2 * value, value + 1, value // 2]
    yield from (other for other in tried if other != value)


def refuses(task: Task[Any], **request: Any) -> str | None:
    """The text of the error for this request; None if it is answered."""
    try:
        task.batch(**request)
    except RangeError as error:
        return str(error)
    return None


def rows(batches: Iterator[Batch]) -> set[tuple[int, ...]]:
    """The inputs of all batches, one hashable value per example."""
    return {tuple(row) for batch in batches for row in batch.inputs.tolist()}


def same(one: Batch, two: Batch) -> bool:
    pairs: list[tuple[Tensor, Tensor]] = list(zip(one, two, strict=True))
    return all(a.equal(b) for a, b in pairs)


def assert_same(one: Batch, two: Batch) -> None:
    assert same(one, two), "two draws of one batch differ"
