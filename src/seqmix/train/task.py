"""Training and evaluation on the tasks of `seqmix.tasks`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqmix.core.errors import ConfigError
from seqmix.models.backbone import ModelSpec
from seqmix.models.pretrained import load_language_model, quiet
from seqmix.ops import record_forms
from seqmix.train.folder import RunFolder
from seqmix.train.language import describe, finished, is_saved, new_model, to_spec
from seqmix.train.loop import run
from seqmix.train.plan import Plan, Record
from seqmix.train.result import Trained

if TYPE_CHECKING:
    from seqmix.tasks import Task

CHECKS = 20  # of `stop_at`, spread over the run


def train_task(
    model: str | Path | ModelSpec | PreTrainedModel,
    task: Task[Any],
    *,
    steps: int,
    batch: int = 64,
    learning_rate: float = 1e-3,
    schedule: str = "cosine",
    warmup: float = 0.05,
    weight_decay: float = 0.1,
    seed: int = 0,
    precision: str = "float32",
    out: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = True,
    progress: bool = False,
    stop_at: float | None = None,
) -> Trained:
    """Trains a model so that its output at position t is the task's label at position t.

    `model` is a layout, a `ModelSpec` (its vocabulary is set to that of the task), a folder or a model to go
    on from. With `stop_at`, the run ends early once a test batch is answered with at least that accuracy.
    `evaluation` of the result has accuracy (on the test split) and chance. Raises as `train` does.
    """
    if batch < 1:
        raise ConfigError(f"batch={batch}, wanted at least 1.")
    plan = Plan(
        steps=steps,
        tokens_per_step=batch * task.config.length,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        precision=precision,
        seed=seed,
        save_every=save_every,
        observe_every=None if stop_at is None else max(1, steps // CHECKS),
        progress=progress,
    )
    folder = None
    if out is not None:
        settings = dataclasses.asdict(plan)
        settings = {k: v for k, v in settings.items() if k not in ("save_every", "progress")}
        described = {
            "model": describe(model),
            "task": type(task).__name__,
            "task_config": task.config.to_dict(),
            "batch": batch,
            "stop_at": stop_at,
        }
        folder = RunFolder(out, described | settings, resume=resume)
        if (result := folder.result()) is not None:
            return finished(folder, result)
    made = _model(model, task, seed)

    def draw(index: int) -> dict[str, Tensor]:
        examples = task.batch(index, batch)
        return {
            "input_ids": examples.inputs,
            "labels": examples.labels,
            "shift_labels": examples.labels,  # already under the position that predicts them
        }

    def observe(record: Record) -> dict[str, float]:
        accuracy = evaluate_task(made, task, batches=1, batch=batch)
        return {"accuracy": accuracy, "stop": accuracy >= (stop_at or 2.0)}

    with record_forms() as forms:
        record = run(made, draw, plan, folder=folder, observe=observe)
    trained = Trained(
        model=made,
        tokenizer=None,
        folder=folder.path if folder else None,
        history=record.history,
        evaluation={"accuracy": evaluate_task(made, task, batch=batch), "chance": task.chance()},
        steps=record.steps,
        tokens=record.tokens,
        seconds=record.seconds,
        tokens_per_second=record.tokens_per_second,
        forms=sorted(forms),
    )
    if folder:
        with quiet():
            folder.finish(made, None, trained.record())
    return trained


@torch.no_grad()
def evaluate_task(
    model: PreTrainedModel,
    task: Task[Any],
    *,
    length: int | None = None,
    batches: int = 4,
    batch: int = 64,
) -> float:
    """Accuracy at the scored positions of `batches` test batches; `length` tests another length."""
    model.eval()
    predictions, labels = [], []
    for index in range(batches):
        examples = task.batch(index, batch, split="test", length=length)
        logits = model(input_ids=examples.inputs.to(model.device), use_cache=False).logits
        predictions.append(logits.argmax(-1).cpu())
        labels.append(examples.labels)
    return task.accuracy(torch.cat(predictions), torch.cat(labels))


def _model(
    model: str | Path | ModelSpec | PreTrainedModel, task: Task[Any], seed: int
) -> PreTrainedModel:
    if not isinstance(model, nn.Module) and not is_saved(model):
        return new_model(dataclasses.replace(to_spec(model), vocabulary=task.vocabulary), seed)
    made = model if isinstance(model, nn.Module) else load_language_model(model)[0]
    if made.config.vocab_size < task.vocabulary:
        raise ConfigError(
            f"The task has {task.vocabulary} ids and the model only {made.config.vocab_size}. "
            "Train a new model, from a layout or a specification."
        )
    return made
