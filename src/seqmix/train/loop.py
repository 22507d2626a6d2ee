"""The training loop: transformers.Trainer, made exactly resumable and quiet.

Batches are a function of their index, so resuming means to go on at the right index; losses, time used and
history are part of a checkpoint. Saving is the Trainer's, into a scratch folder that is then moved.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from seqmix.core.errors import CheckpointError, ConfigError, NumericalError, SeqmixError
from seqmix.models.pretrained import quiet
from seqmix.train.folder import RECORD, RunFolder, read_json
from seqmix.train.plan import PRECISIONS, Plan, Record, parameter_groups
from seqmix.train.progress import ProgressBar
from seqmix.train.schedule import factor

BATCH = dict[str, Tensor]
POINTS = 200  # of a loss curve
SAVE_SECONDS = 60.0  # between checkpoints, where no number of steps is given
ENDLESS = 2**31 - 1  # steps of a run that a clock ends


class Stream(IterableDataset[BATCH]):
    """`batch(0)`, `batch(1)`, ... from `start` on, without end."""

    def __init__(self, batch: Callable[[int], BATCH], start: int = 0) -> None:
        self.batch = batch
        self.start = start

    def __iter__(self) -> Iterator[BATCH]:
        index = self.start
        while True:
            yield self.batch(index)
            index += 1


# Called with the record; its values join the history. True under "stop" ends the run.
Observer = Callable[[Record], dict[str, float]]
Loss = Callable[[Any, BATCH], Tensor]


def run(
    model: PreTrainedModel,
    batch: Callable[[int], BATCH],
    plan: Plan,
    *,
    folder: RunFolder | None = None,
    observe: Observer | None = None,
    loss: Loss | None = None,
) -> Record:
    """Trains `model` in place; `batch(i)` gives the inputs of the i-th forward pass, `loss(model, inputs)` their
    loss, by default the model's own.

    With `folder`, continues from its newest checkpoint and saves there. Raises `NumericalError` (with the
    attribute `step`) for a loss that is not finite, `KeyboardInterrupt` after Ctrl-C, once what there is
    has been saved.
    """
    checkpoint = folder.newest() if folder else None
    record = Record()
    if checkpoint is not None:
        record = Record(**read_json(checkpoint / RECORD))
    with ExitStack() as stack:
        scratch = (
            folder.scratch() if folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        )
        stack.enter_context(quiet())
        trainer = _Trainer(model, batch, plan, record, folder, scratch, loss)
        bar = stack.enter_context(ProgressBar(plan.steps, plan.seconds, shown=plan.progress))
        pace = _Pace(trainer, bar, observe)
        trainer.add_callback(pace)
        stack.enter_context(pace.interruptible())
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (
            OSError,
            RuntimeError,
            KeyError,
            ValueError,
            SafetensorError,
            UnpicklingError,
        ) as error:
            if checkpoint is None or pace.began:
                raise
            # torch goes on with advice that is not for users
            reason = str(error).partition(". ")[0]
            raise CheckpointError(
                f"{checkpoint} cannot be continued ({reason}). Remove it to start the run again."
            ) from error
    model.eval()
    if pace.interrupted and not pace.is_over():
        kept = folder.newest() if folder else None
        raise KeyboardInterrupt(
            f"Stopped after step {record.steps}. "
            + (
                f"Saved as {kept}: the same call goes on from there."
                if kept
                else "Nothing was saved."
            )
        )
    return record


class _Trainer(Trainer):
    """Trainer with our optimiser groups, schedule, data order, losses and checkpoint folder."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Callable[[int], BATCH],
        plan: Plan,
        record: Record,
        folder: RunFolder | None,
        scratch: Path,
        loss: Loss | None,
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(scratch),
            max_steps=plan.steps or ENDLESS,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=plan.accumulate,
            max_grad_norm=plan.clip,
            learning_rate=plan.learning_rate,
            bf16=PRECISIONS[plan.precision],
            use_cpu=not torch.accelerator.is_available(),
            seed=plan.seed,
            ignore_data_skip=True,  # the stream starts at the right batch by itself
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_nan_inf_filter=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        super().__init__(model, arguments)
        self.remove_callback(PrinterCallback)
        # A new accelerator has nothing to free, and collecting garbage takes longer than a small run.
        self.accelerator.free_memory = lambda *objects: list(objects)
        if self.args.world_size > 1:
            raise ConfigError("Training runs in one process. Start it without torchrun.")
        self.plan = plan
        self.record = record
        self.folder = folder
        self.loss = loss
        self.stream = Stream(batch, start=record.steps * plan.accumulate)

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.stream, batch_size=None)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.plan.weight_decay)
            self.optimizer = torch.optim.AdamW(
                groups, lr=self.plan.learning_rate, betas=self.plan.betas, fused=True
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        plan, record = self.plan, self.record

        def learning_rate(step: int) -> float:
            if plan.steps is not None:
                return factor(plan.schedule, (step + 0.5) / plan.steps, warmup=plan.warmup)
            used = record.seconds / (plan.seconds or 1.0)
            return max(0.01, factor(plan.schedule, used, warmup=plan.warmup))

        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer, learning_rate
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: BATCH, num_items_in_batch: Any = None
    ) -> Tensor:
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except SeqmixError as error:
            # Operators refuse arguments that are not finite. After the first step only the weights can be to
            # blame, even finite ones: the decay rate -exp(w) overflows long before w does.
            if self.record.steps == 0:
                raise
            reason = str(error).partition(". ")[0]
            raise self._diverged(f"not computable, for the weights diverged ({reason})") from error
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(str(value))
        self.record.loss_sum += value
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: BATCH,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        value = self.loss(model, inputs)
        # With a number of items the Trainer does not divide by the batches that it adds up.
        return value if num_items_in_batch is None else value / self.plan.accumulate

    def _diverged(self, what: str) -> NumericalError:
        step = self.record.steps + 1
        error = NumericalError(
            f"The loss at step {step} is {what}. Lower the learning rate "
            f"({self.plan.learning_rate:g}) or lengthen the warm-up."
        )
        error.step = step  # type: ignore[attr-defined]
        return error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        if wrong := sorted({*load_result.missing_keys, *load_result.unexpected_keys} - tied):
            raise CheckpointError(f"its weights are of another model: {', '.join(wrong[:3])}")

    def floating_point_ops(self, inputs: BATCH) -> int:
        return 0  # walks over all modules at every step, for a number that nobody reads

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.folder is None:
            return
        written = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with self.folder.saving():
            super()._save_checkpoint(model, trial)
            text = json.dumps(dataclasses.asdict(self.record))
            (written / RECORD).write_text(text, encoding="utf-8")
            self.folder.keep(written, self.record.steps)


class _Pace(TrainerCallback):
    """Counts, times, observes, saves and stops."""

    def __init__(self, trainer: _Trainer, bar: ProgressBar, observe: Observer | None) -> None:
        self.trainer = trainer
        self.plan = trainer.plan
        self.record = trainer.record
        self.bar = bar
        self.observe = observe
        self.began = False
        self.interrupted = False
        self.stopped = False
        self.rate = 0.0
        self.mark: float | None = None  # when the time that counts for the next step began
        self.saved = time.monotonic()

    def is_over(self) -> bool:
        """Whether the budget is used up, or the observer has ended the run."""
        if self.plan.steps is not None:
            return self.stopped or self.record.steps >= self.plan.steps
        return self.stopped or self.record.seconds >= (self.plan.seconds or 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = True
        self.bar.update(self.record)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.rate = self.trainer.optimizer.param_groups[0]["lr"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        plan, record = self.plan, self.record
        record.steps += 1
        record.tokens += plan.tokens_per_step
        record.loss_steps += 1
        if self.mark is not None:
            record.seconds += time.perf_counter() - self.mark
            record.timed_tokens += plan.tokens_per_step
        is_last = self.is_over()
        due = plan.observe_every is not None and record.steps % plan.observe_every == 0
        if is_last or due or self._done() * POINTS >= len(record.history) + 1:
            self._write_history(observe=due and self.observe is not None)
        control.should_training_stop = self.is_over() or self.interrupted
        control.should_save = self._is_time_to_save() and not self.is_over()
        self.bar.update(record)
        self.mark = time.perf_counter()
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.saved = time.monotonic()
        self.mark = time.perf_counter()

    def _done(self) -> float:
        if self.plan.steps is not None:
            return self.record.steps / self.plan.steps
        return self.record.seconds / (self.plan.seconds or 1.0)

    def _write_history(self, *, observe: bool) -> None:
        record = self.record
        entry = {
            "step": record.steps,
            "tokens": record.tokens,
            "seconds": record.seconds,
            "loss": record.loss_sum / record.loss_steps,
            "learning_rate": self.rate,
        }
        if observe and self.observe is not None:
            self.trainer.model.eval()
            seen = self.observe(record)
            self.trainer.model.train()
            self.stopped = bool(seen.pop("stop", False))
            entry |= seen
        record.history.append(entry)
        record.loss_sum, record.loss_steps = 0.0, 0

    def _is_time_to_save(self) -> bool:
        if self.interrupted:
            return True
        if self.plan.save_every is not None:
            return self.record.steps % self.plan.save_every == 0
        return time.monotonic() - self.saved >= SAVE_SECONDS

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the run after the step it is in; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def on_interrupt(number: int, frame: Any) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
