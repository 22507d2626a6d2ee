"""Training inside a transform, which a stopped run goes on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from seqmix.compress._transform import Calibration, Work
from seqmix.models.hf import SeqmixForCausalLM, load
from seqmix.models.pretrained import quiet
from seqmix.train.folder import RunFolder
from seqmix.train.plan import Record

Train = Callable[[SeqmixForCausalLM, RunFolder | None], tuple[SeqmixForCausalLM, Record]]


def trained(
    name: str,
    model: SeqmixForCausalLM,
    data: Calibration,
    work: Work,
    options: Mapping[str, Any],
    train: Train,
) -> tuple[SeqmixForCausalLM, dict[str, float]]:
    """What `train(model, folder)` gives and what it used: tokens, seconds and the last loss.

    Where `work` has a folder, training goes on from its newest checkpoint there, and what is finished is loaded.
    A folder with a run of another model, text or `options` is refused.
    """
    folder = None
    if work.folder is not None:
        text = [*data.windows.shape, int(data.windows.sum())]
        arguments = {**options, "model": model.config.to_spec().to_dict(), "text": text}
        folder = RunFolder(work.folder / name, arguments, resume=True)
        if (known := folder.result()) is not None:
            with quiet():
                made, _ = load(folder.path)
            assert isinstance(made, SeqmixForCausalLM)
            return made.to(model.device, model.dtype).train(model.training), known
    made, record = train(model, folder)
    used = {
        "tokens": record.tokens,
        "seconds": round(record.seconds, 1),
        "loss": record.history[-1]["loss"],
    }
    if folder is not None:
        with quiet():
            folder.finish(made, None, used)
    return made.train(model.training), used
