"""What claims about learned models share: training on a task or a text, and accuracy where it counts.

Settings are one flat mapping: the fields of `ModelSpec` (width, depth, heads, channel ...) describe the
model, the others go to `train_task` or `train`. All models that a claim compares get the same settings, but
for what the claim names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from seqmix.claims._claim import Run
from seqmix.core.errors import RangeError
from seqmix.models.backbone import ModelSpec
from seqmix.tasks import Batch, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLES = 256  # that an accuracy is measured on
QUICK_TEXT = str(Path(__file__).parent.parent / "ops")  # our own source, where any text does


def specify(layout: str, settings: Mapping[str, Any]) -> tuple[ModelSpec, dict[str, Any]]:
    """The model that `settings` describe, and the settings that are left for its training."""
    fields = ModelSpec.fields()
    spec = ModelSpec(layout=layout, **{k: v for k, v in settings.items() if k in fields})
    return spec, {k: v for k, v in settings.items() if k not in fields}


def train_on(
    layout: str, task: Task[Any], settings: Mapping[str, Any], *, seed: int
) -> PreTrainedModel:
    """A new model trained on `task` from `seed`."""
    from seqmix.train import train_task

    spec, training = specify(layout, settings)
    return train_task(spec, task, seed=seed, **training).model


def language_model(
    layout: str, windows: Tensor, *, width: int, vocabulary: int, seed: int, **training: Any
) -> Any:
    """A new language model of this layout, trained on windows [N, T]."""
    from seqmix.models.hf import create
    from seqmix.objectives import OBJECTIVES
    from seqmix.train.objective import train_objective

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create(layout, width=width, vocabulary=vocabulary)
    train_objective(model, windows, OBJECTIVES.get("causal")(), seed=seed, **training)
    return model.eval()


@torch.no_grad()
def accuracy(
    model: PreTrainedModel,
    task: Task[Any],
    *,
    length: int | None = None,
    first: int = 0,
    examples: int = EXAMPLES,
) -> float:
    """Accuracy on test examples of `length`, at the scored positions from `first` on."""
    inputs, labels = task.batch(0, examples, split="test", length=length)
    predictions = model(input_ids=inputs, use_cache=False).logits.argmax(-1)
    return task.accuracy(predictions[:, first:], labels[:, first:])


def accuracy_after_training(
    run: Run,
    layout: str,
    task: Task[Any],
    settings: Mapping[str, Any],
    *,
    seed: int,
    name: str | None = None,
    tests: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, float]:
    """Remembered accuracies of a model trained on `task`: one per entry of `tests`, which give the
    `length` and `first` of `accuracy`; without tests, one at the training length.

    It is remembered as `name` (the layout by default), the learning rate and the seed.
    """

    def measure() -> dict[str, float]:
        model = train_on(layout, task, settings, seed=seed)
        wanted = {"training length": {}} if tests is None else tests
        return {test: accuracy(model, task, **places) for test, places in wanted.items()}

    rate = settings["learning_rate"]
    return dict(run.remember(f"{name or layout}, rate {rate:g}, seed {seed}", measure))


def best_learning_rate(
    run: Run,
    layout: str,
    task: Task[Any],
    settings: Mapping[str, Any],
    *,
    rates: Sequence[float],
    seed: int,
    name: str | None = None,
    tests: Mapping[str, Mapping[str, int]] | None = None,
) -> float:
    """The rate with the highest mean accuracy over `tests` on one seed, which is kept for choosing."""

    def score(rate: float) -> float:
        tried = dict(settings) | {"learning_rate": rate}
        found = accuracy_after_training(run, layout, task, tried, seed=seed, name=name, tests=tests)
        return sum(found.values()) / len(found)

    return rates[0] if len(rates) == 1 else max(rates, key=score)


def loss_after_training(
    run: Run,
    layout: str,
    data: Any,
    settings: Mapping[str, Any],
    *,
    seed: int,
    name: str | None = None,
) -> float:
    """Remembered loss, in nats per token of held-out text, of a model trained on `data` (see `train`)."""
    from seqmix.train import train

    def measure() -> float:
        spec, training = specify(layout, settings)
        return train(spec, data, seed=seed, progress=False, **training).evaluation["loss"]

    return float(run.remember(f"{name or layout}, seed {seed}", measure))


def at_growing_lengths(task: Task[Any], shortest: int, batches: int) -> Task[Any]:
    """The same task, with a random length for every training batch.

    The longest is `shortest` at first and grows evenly to the task's own over so many batches.
    """
    full = task.config.length
    if not task.shortest <= shortest <= full or batches < 1:
        raise RangeError(
            f"at_growing_lengths: shortest={shortest}, batches={batches}, wanted {task.shortest} to {full} "
            "and at least 1."
        )

    class AtGrowingLengths(type(task)):  # type: ignore[misc]
        def batch(
            self, index: int, size: int, *, split: str = "train", length: int | None = None
        ) -> Batch:
            if split == "train" and length is None:
                longest = shortest + int((full - shortest) * min(1.0, index / batches))
                random = np.random.default_rng([self.config.seed, index])
                length = int(random.integers(shortest, longest + 1))
            return super().batch(index, size, split=split, length=length)

    return AtGrowingLengths(task.config)
