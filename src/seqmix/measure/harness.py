"""Tasks of lm-evaluation-harness on any model, where their data is at hand."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqmix.core import extras
from seqmix.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    batch: int = 1,
) -> dict[str, dict[str, float]]:
    """The figures that lm-evaluation-harness gives for each task.

    `include` is a folder with further tasks (YAML files), whose data may lie beside them; `limit` takes only so many
    documents of each. Raises `MissingExtra` without the package, `DataError` for a task that it has not or whose data
    cannot be had.
    """
    evaluation = extras.require("lm_eval", extra="harness")
    manager = extras.require("lm_eval.tasks", extra="harness").TaskManager(
        include_path=None if include is None else str(include)
    )
    for task in tasks:
        if task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise DataError(
                f"lm-evaluation-harness has no task {task!r}.{hint} `lm-eval ls tasks` lists them; --include FOLDER "
                "adds others."
            )
    wrapped = extras.require("lm_eval.models.huggingface", extra="harness").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal"
    )
    try:
        found: dict[str, Any] = evaluation.simple_evaluate(
            wrapped,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    except (OSError, ValueError) as error:  # no network, no such data set
        raise DataError(
            f"The data of {', '.join(tasks)} cannot be loaded: {str(error).splitlines()[0]} It needs a network or a "
            "filled cache; tasks over local files are given by --include FOLDER."
        ) from error
    return {
        task: {
            name.partition(",")[0]: value
            for name, value in figures.items()
            if isinstance(value, int | float) and not name.endswith("_stderr,none")
        }
        for task, figures in found["results"].items()
    }
