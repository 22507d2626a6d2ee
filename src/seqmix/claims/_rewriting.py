"""Rewriting of real text, of which capitals and punctuation are lost, by models that write in parallel or in order.

Axes: N texts, T bytes of a source and as many of its target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqmix.claims._answers import Answer
from seqmix.claims._claim import Finding, Run, compare_groups
from seqmix.claims._passages import BYTES, MASK, TRAINING, VOCABULARY
from seqmix.claims._timing import median_milliseconds

NEAR, FASTER = 0.05, 3.0  # how much worse it may be than the other, and how many times as fast


def plain(texts: Tensor) -> Tensor:
    """ASCII bytes in lower case, with spaces for all that is neither a letter nor a digit."""
    table = torch.arange(BYTES)
    for byte in range(128):
        letter = chr(byte)
        table[byte] = ord(letter.lower() if letter.isalnum() else " ")
    return table[texts]


def pairs(run: Run) -> tuple[Tensor, Tensor]:
    """Sources with their targets [N, 2 T], for training and from the end of the corpus for tests."""
    from seqmix.data.text import read_text

    content = "\n".join(read_text(run["corpus"]).documents).encode()
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    rows = rows[: len(rows) // run["bytes"] * run["bytes"]].view(-1, run["bytes"])
    texts = torch.cat([plain(rows), rows], dim=1)
    cut = int(TRAINING * len(texts))
    tests = torch.linspace(cut, len(texts) - 1, run["rewritten"]).long()
    return texts[:cut], texts[tests]


def rewriting(run: Run, seed: int) -> dict[str, Any]:
    """What every way of writing restores, and the time that it takes for one text."""
    from seqmix.convert.causality import redirect
    from seqmix.generate.mask_predict import mask_predict
    from seqmix.models.hf import create
    from seqmix.objectives import OBJECTIVES, Objective
    from seqmix.train.objective import train_objective

    texts, tests = pairs(run)
    length = run["bytes"]
    windows = texts[
        :, length:
    ].flatten()  # plain text, in windows as long as a source with its target
    windows = windows[: len(windows) // (2 * length) * 2 * length].view(-1, 2 * length)

    def objective(name: str, **options: Any) -> Objective:
        kind = OBJECTIVES.get(name)
        return kind(kind.Config.from_dict(options))  # type: ignore[no-any-return]

    def trained(model: Any, data: Tensor, goal: Objective, steps: int) -> Any:
        rate = run["rewriting_rate"]
        options = {"batch": run["batch"], "learning_rate": rate, "seed": seed}
        train_objective(model, data, goal, steps=steps, **options)
        return model.eval()

    def new(direction: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layout = f"{run['rewriting_depth']}x[attention]"
            return redirect(create(layout, width=run["width"], vocabulary=VOCABULARY), direction)

    masked = objective("masked", mask_id=MASK, vocabulary=BYTES, share=run["share"])
    target = objective("masked_target", mask_id=MASK, tokens=length)
    steps, more = run["rewriting_pretraining_steps"], run["rewriting_steps"]
    begun = trained(trained(new("both"), windows, masked, steps), texts, target, more)
    fresh = trained(new("both"), texts, target, more)
    causal = trained(new("causal"), windows, objective("causal"), steps)
    causal = trained(causal, texts, Answer(length), more)

    def in_parallel(model: Any, passes: int) -> Callable[[Tensor], Tensor]:
        return lambda source: mask_predict(
            model, source, length=length, mask_id=MASK, passes=passes
        )

    def in_order(source: Tensor) -> Tensor:
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return causal.generate(source, max_new_tokens=length, **options)[:, length:]  # type: ignore[no-any-return]

    ways = {f"parallel, {n} passes": in_parallel(begun, n) for n in run["passes"]}
    ways |= {
        "parallel, not pretrained": in_parallel(fresh, run["passes"][-1]),
        f"in order, {length} passes": in_order,
    }
    sources, targets = tests.split(length, dim=1)
    changed = (sources != targets).sum()
    return {
        "restored": {
            name: 1 - float((write(sources) != targets).sum() / changed)
            for name, write in ways.items()
        },
        "milliseconds": median_milliseconds(
            {name: lambda w=write: w(sources[:1]) for name, write in ways.items()}, run["repeats"]
        ),
        "parameters": [model.num_parameters() for model in (begun, causal)],
    }


def findings(run: Run) -> list[Finding]:
    found = [
        run.remember(f"rewriting, seed {seed}", lambda s=seed: rewriting(run, s))
        for seed in range(run["rewriting_seeds"])
    ]
    restored = {name: [one["restored"][name] for one in found] for name in found[0]["restored"]}
    times = [one["milliseconds"] for one in found]
    ours, last = f"parallel, {run['passes'][-1]} passes", f"in order, {run['bytes']} passes"
    faster = min(time[last] / time[ours] for time in times)
    near = compare_groups(restored[ours], restored[last], margin=-NEAR)
    return [
        Finding(
            "A masked language model is a good beginning for a sequence-to-sequence model that is not autoregressive.",
            "restores a larger share of capitals and punctuation (1 - wrong bytes / lost bytes) than the same model "
            "without pretraining after equal fine-tuning, beyond two standard errors over seeds",
            {name: restored[name] for name in (ours, "parallel, not pretrained")},
            compare_groups(restored[ours], restored["parallel, not pretrained"]),
        ),
        Finding(
            "It writes about as well as an autoregressive model of its size, pretrained and fine-tuned as long, in "
            "fewer passes.",
            f"restores at most {NEAR} less, beyond two standard errors over seeds, and one text at least {FASTER:g} "
            "times as fast in every run (interleaved medians)",
            {"restored": restored, "milliseconds": times, "times as fast": faster}
            | {"parameters": found[0]["parameters"]},
            near if faster >= FASTER else "not reproduced",
        ),
    ]
