"""What claims about rounded models share: the model, its texts, its loss, and its size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.claims._claim import Run

if TYPE_CHECKING:
    from seqmix.compress import Calibration
    from seqmix.models.hf import SeqmixForCausalLM


def prepared(run: Run) -> tuple[SeqmixForCausalLM, Calibration, Tensor]:
    """The model, the calibration text, and held-out windows [N, T] of other documents of the corpus."""
    from seqmix.compress import Calibration
    from seqmix.convert.hub import to_seqmix
    from seqmix.data.text import Corpus, read_text
    from seqmix.models.hf import create, load

    if run["model"] == "tiny":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create("2x[attention]", width=64).eval()
        rows = torch.tensor(list(Path(__file__).read_bytes()[:1024])).view(-1, run["length"])
        return model, Calibration(windows=rows[:2]), rows[-4:]
    source, tokenizer = load(run["model"])
    assert tokenizer is not None
    documents = read_text(run["data"]).documents
    halves = ((documents[0][:100_000],), (documents[-1][-100_000:],))
    calibration, held_out = (
        Calibration.of(
            Corpus("part", part), tokenizer, length=run["length"], windows=run["windows"]
        )
        for part in halves
    )
    return to_seqmix(source).eval(), calibration, held_out.windows


def fitted(name: str, model: Any, data: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model that a transform of `seqmix.compress` makes, and its notes."""
    from seqmix.compress import TRANSFORMS, Work

    work = Work()
    return TRANSFORMS.get(name)(**options).fit(model, data, work).eval(), work.notes


@torch.no_grad()
def loss(model: Any, windows: Tensor) -> float:
    """Nats per token of windows [N, T]."""
    total = 0.0
    for rows in windows.split(2):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        total += float(
            F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
        )
    return total / windows[:, 1:].numel()


def num_bytes(model: Any) -> int:
    """What the tensors of a model take, shared ones once."""
    tensors = {t.data_ptr(): t for t in model.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())
