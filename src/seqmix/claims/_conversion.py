"""What claims about linearised models share: texts to learn from, the conversion step by step, quality.

`run["model"]` names a pretrained model; `tiny` stands for a small random one of bytes, which shows that a measurement
runs. All learning is from the original's own predictions, never from the text's next tokens, so that nothing is gained
by getting used to the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmix.claims._claim import Run

if TYPE_CHECKING:
    from seqmix.models.hf import SeqmixForCausalLM

CHARACTERS = 400_000  # of each part of the corpus


@dataclass(frozen=True)
class Source:
    """The original, windows to learn from (some of them passkey texts), and windows of another part of the corpus."""

    model: SeqmixForCausalLM
    tokenizer: Any
    learning: Tensor
    held_out: Tensor


def source(run: Run) -> Source:
    """Windows of `run["length"]` tokens: `windows` to learn from, a quarter passkeys, and `held_out`."""
    from seqmix.compress import Calibration
    from seqmix.convert.hub import to_seqmix
    from seqmix.data.text import Corpus, read_text
    from seqmix.models.hf import create, load
    from seqmix.train.language import prepare

    corpus = read_text(run["data"])
    if run["model"] == "tiny":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create(run["layout"], width=32, heads=2).eval()
        _, tokenizer = prepare("attention", "bytes", corpus, seed=0)
    else:
        given, tokenizer = load(run["model"])
        model = to_seqmix(given)
    text = "\n".join(corpus.documents)
    half = min(CHARACTERS, len(text) // 2)

    def windows(part: str, count: int) -> Tensor:
        given = Corpus("part", (part,))
        return Calibration.of(given, tokenizer, length=run["length"], windows=count).windows

    texts, passkeys = windows(text[:half], run["windows"]), run["windows"] // 4
    known = passkey_windows(tokenizer, run["length"], passkeys)
    texts[1 :: len(texts) // passkeys][:passkeys] = known
    return Source(model, tokenizer, texts, windows(text[-half:], run["held_out"]))


def passkey_windows(tokenizer: Any, length: int, count: int) -> Tensor:
    """Passkey texts with their answers, [count, length], of other numbers than those that are asked for later."""
    from seqmix.measure.passkey import passkey_prompts

    rows = []
    answer = len(tokenizer(" 12345", add_special_tokens=False).input_ids)
    for prompt in passkey_prompts(tokenizer, length - answer, count, seed=1):
        ids = tokenizer(f" {prompt.answer}", add_special_tokens=False).input_ids
        rows.append(torch.cat([prompt.ids, torch.tensor(ids)])[:length])
    return torch.stack(rows)


def taught(run: Run, given: Source, to: str) -> tuple[SeqmixForCausalLM, dict[str, Any]]:
    """The original with `to` in every layer after the transfer, and the errors before and after it."""
    from seqmix.convert.linearize import attention_blocks, linearized, transfer, transfer_errors

    blocks = attention_blocks(given.model)
    student = linearized(given.model, to, blocks)
    measured = given.held_out[:2]
    before = transfer_errors(student, given.model, blocks, measured)
    start = quality(student, given.held_out)
    record = transfer(
        student,
        given.model,
        blocks,
        given.learning,
        steps=run["transfer_tokens"] // run["length"],
        learning_rate=run["transfer_rate"],
    )
    after = transfer_errors(student, given.model, blocks, measured)
    return student, {
        "carried over": start,
        "tokens": record.tokens,
        "errors before": {str(number): value for number, value in before.items()},
        "errors after": {str(number): value for number, value in after.items()},
        "transferred": quality(student, given.held_out),
    }


def hybrid_of(
    run: Run, given: Source, student: SeqmixForCausalLM
) -> tuple[SeqmixForCausalLM, list[int]]:
    """The student with a quarter of its layers attention again: those whose replacement changes most."""
    from seqmix.convert.linearize import attention_blocks, damages, with_attention_of

    blocks = attention_blocks(given.model)
    damage = damages(student, given.model, blocks, given.learning[: run["damage_windows"]])
    kept = sorted(sorted(blocks, key=lambda number: -damage[number])[: round(len(blocks) / 4)])
    return with_attention_of(student, given.model, kept), kept


def recovered(run: Run, given: Source, student: SeqmixForCausalLM) -> SeqmixForCausalLM:
    """The student after low-rank training on the original's predictions alone."""
    from seqmix.compress import TRANSFORMS, Calibration, Work

    recover = TRANSFORMS.get("recover")(
        tokens=run["recover_tokens"], distillation=1.0, learning_rate=run["recover_rate"]
    )
    data = Calibration(windows=given.learning, teacher=given.model)
    made: SeqmixForCausalLM = recover.fit(student, data, Work())
    return made


@torch.no_grad()
def quality(model: Any, windows: Tensor) -> dict[str, float]:
    """Loss in nats per token, and the share of tokens that the most probable one hits, on windows [N, T]."""
    model.eval()
    losses, hits = [], []
    for ids in windows:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        losses.append(float(F.cross_entropy(logits, ids[1:])))
        hits.append(float((logits.argmax(-1) == ids[1:]).float().mean()))
    return {"loss": sum(losses) / len(losses), "accuracy": sum(hits) / len(hits)}


def passkeys(run: Run, given: Source, model: Any, lengths: Sequence[int]) -> dict[str, float]:
    """Accuracy by length of the prompt."""
    from seqmix.measure.passkey import passkey_accuracy

    model.eval()
    return {
        str(length): passkey_accuracy(model, given.tokenizer, length, run["passkeys"])
        for length in lengths
    }


OWN_SOURCE = str(Path(__file__).parent.parent / "ops")  # text for runs that only show that they run
