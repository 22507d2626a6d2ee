"""What ways of decoding find in a pretrained model: how likely it is, and whether it degenerates.

Axes: N texts, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmix.claims._claim import Finding, Run, Verdict, compare_groups

RUN, LEAST, SHARE = 3, 8, 0.25  # tokens of a run; of the shortest text; of texts that degenerate


def degenerate(ids: Tensor, finished: Tensor, eos: int) -> Tensor:
    """Whether texts [N, T] say a run of tokens twice, or have ended before they said anything, [N]."""
    early = finished & (ids[:, -1] == eos) & (ids.shape[1] <= LEAST)
    if ids.shape[1] <= RUN:
        return early
    runs = ids.unfold(1, RUN, 1)
    same = (runs.unsqueeze(1) == runs.unsqueeze(2)).all(-1)
    return early | same.tril(-1).flatten(1).any(1)


def subject(settings: dict[str, Any]) -> tuple[Any, Tensor, int]:
    """A pretrained model, a text [1, T] and the id that ends one; a random model of random tokens if none is named."""
    from seqmix.convert.hub import to_seqmix
    from seqmix.data.text import read_text
    from seqmix.models.hf import create
    from seqmix.models.pretrained import load

    count = settings["prompts"] * (settings["given"] + settings["written"])
    if settings["model"] is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create("2x[attention]", width=16, heads=2, vocabulary=16)
            return model.eval(), torch.randint(16, (1, count)), 0
    made, tokenizer = load(settings["model"])
    assert tokenizer is not None
    text = "".join(read_text(settings["corpus"]).documents)[-40 * count :]
    return to_seqmix(made), tokenizer(text, return_tensors="pt").input_ids, tokenizer.eos_token_id


def decoded(run: Run, rate: float) -> list[dict[str, Any]]:
    """For every prompt, what each way of decoding writes after it."""
    from seqmix.generate.conditional_beams import conditional_beam_search

    settings = run["decoding"]
    model, text, eos = subject(settings)
    given, written = settings["given"], settings["written"]

    def anything(ids: Tensor, finished: Tensor) -> Tensor:
        return torch.zeros(len(ids))

    def sound(ids: Tensor, finished: Tensor) -> Tensor:
        return anything(ids, finished).masked_fill(degenerate(ids, finished, eos), -torch.inf)

    def search(prompt: Tensor, beams: int, condition: Any) -> Tensor:
        options = {"beams": beams, "new_tokens": written, "eos": eos}
        return conditional_beam_search(model, prompt, condition, **options)[0]

    ways = {
        "greedy": lambda x: search(x, 1, anything),
        "beams": lambda x: search(x, settings["beams"], anything),
        "greedy, conditional": lambda x: search(x, 1, sound),
        "beams, conditional": lambda x: search(x, settings["beams"], sound),
        "greedy, optimised states": lambda x: corrected_greedy(model, x, eos, settings, rate),
    }
    starts = torch.linspace(0, text.shape[1] - given - written, settings["prompts"]).long()
    found = []
    for start in starts.tolist():
        prompt, true = text[:, start : start + given + written].split([given, written], dim=1)
        one = {}
        for name, write in ways.items():
            ids = write(prompt)
            one[name] = {
                "log p": likelihood(model, prompt, ids),
                "tokens": len(ids),
                "degenerate": bool(degenerate(ids[None], torch.tensor([True]), eos)),
                "words of the true text": overlap(ids, true[0]),
            }
        found.append(one)
    return found


@torch.no_grad()
def likelihood(model: Any, prompt: Tensor, ids: Tensor) -> float:
    """Nats of a continuation [T]."""
    logits = model(torch.cat([prompt, ids[None]], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
    return float(logits.float().log_softmax(-1).gather(1, ids[:, None]).sum())


def overlap(ids: Tensor, true: Tensor) -> float:
    """F1 of the tokens of a continuation [T], in any order, with those of the true one."""
    size = int(max(ids.max(), true.max())) + 1
    counts = [torch.bincount(part, minlength=size) for part in (ids, true)]
    return float(2 * torch.minimum(*counts).sum() / (len(ids) + len(true)))


def corrected_greedy(
    model: Any, prompt: Tensor, eos: int, settings: dict[str, Any], rate: float
) -> Tensor:
    """The likeliest tokens one by one, after the states of the prompt were optimised."""
    from seqmix.generate.state_optimization import read_with_optimized_states

    _, state = read_with_optimized_states(model, prompt, window=settings["window"], rate=rate)
    ids = prompt[:, -1:]
    written: list[Tensor] = []
    with torch.no_grad():
        while len(written) < settings["written"] and not (written and int(ids) == eos):
            logits, state = model.model(ids, state)
            ids = logits[:, -1:].argmax(-1)
            written.append(ids[0, 0])
    return torch.stack(written)


def findings(run: Run, rate: float) -> list[Finding]:
    found = run.remember("decoding", lambda: decoded(run, rate))

    def all_of(name: str, what: str) -> list[float]:
        return [float(one[name][what]) for one in found]

    table = {
        name: {what: sum(all_of(name, what)) / len(found) for what in found[0][name]}
        for name in found[0]
    }
    share = {name: row["degenerate"] for name, row in table.items()}

    def likelier(name: str, than: str) -> Verdict:
        gaps = [a - b for a, b in zip(all_of(name, "log p"), all_of(than, "log p"), strict=True)]
        return compare_groups(gaps, [0.0] * len(gaps))

    sound = share["beams"] >= SHARE and share["beams, conditional"] == 0
    diverges = share["beams"] >= share["greedy"] and share["beams"] >= SHARE
    return [
        Finding(
            "Beams that are conditioned on not degenerating find likely texts among those that do not.",
            f"of plain beams at least {SHARE:.0%} degenerate (a run of {RUN} tokens twice, or an end within {LEAST} "
            "tokens) and of conditional ones none, which are likelier than what greedy search finds under the same "
            "condition, beyond two standard errors over prompts",
            table,
            likelier("beams, conditional", "greedy, conditional") if sound else "not reproduced",
        ),
        Finding(
            "What is likelier is not better: beams find likelier texts than greedy search, and degenerate as often.",
            f"log p higher beyond two standard errors over prompts, and at least as many, and {SHARE:.0%}, degenerate",
            {"log p": {n: table[n]["log p"] for n in ("greedy", "beams")}, "degenerate": share},
            likelier("beams", "greedy") if diverges else "not reproduced",
        ),
    ]
