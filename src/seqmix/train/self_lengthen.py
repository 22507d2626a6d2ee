"""Self-lengthening: a model learns to write longer texts from its own texts, which it makes longer itself.

Two copies of one model play two roles. In every round

    short = Generator(instruction)
    long  = a + Extender(instruction, short; a),   a = beginning of Extender(instruction, first half of short)
    Generator learns instruction -> long;   Extender learns (instruction, short) -> long

so that the next round starts from longer texts. The Extender writes in two stages: with the first half of a text it
elaborates more, and the beginning of that makes it go on in the same manner when it sees the whole text. A long text is
kept only if it is longer by a fifth, ends a sentence, and says nothing twice. Quan et al. 2024 (arXiv:2410.23933),
section 3. The shares below are those of the authors' code; its unit is the paragraph, ours the sentence, because small
models write short texts.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqmix.core.errors import ConfigError, DataError
from seqmix.data.diversity import repeated_ngrams
from seqmix.data.packing import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGER = 1.2  # times as many words: what an extension has to reach
KEPT = 2 / 3  # of the sentences of the first stage, that the second goes on from
SHOWN = 0.8  # chance of each sentence of a short text to be shown to the Extender in training
REPEATED = 13  # words in a row that must not come twice
SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What both roles are asked, as strings: `{instruction}` stands for the task and `{text}` for a short text."""

    question: str
    extension: str

    def __post_init__(self) -> None:
        for name, wanted in {"question": 1, "extension": 2}.items():
            holes = [hole for hole in ("{instruction}", "{text}") if hole in getattr(self, name)]
            if len(holes) != wanted:
                raise ConfigError(
                    f"Roles: {name}={getattr(self, name)!r} has {holes}, wanted {{instruction}}"
                    + (" and {text}." if wanted == 2 else " alone.")
                )

    def ask(self, instruction: str) -> str:
        return self.question.replace("{instruction}", instruction)

    def ask_for_more(self, instruction: str, text: str) -> str:
        return self.extension.replace("{instruction}", instruction).replace("{text}", text)


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A model that writes: samples of at most `new_tokens` tokens, at a temperature, from the likeliest of them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_tokens: int
    temperature: float = 0.7
    top_p: float = 0.9

    @torch.no_grad()
    def write(self, prompts: Sequence[str], *, seed: int) -> list[str]:
        """A continuation of each prompt, up to the first end of text; it follows `seed`."""
        ids = [self.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        longest = max(map(len, ids))
        padded = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for row, known in enumerate(ids):
            padded[row, longest - len(known) :] = torch.tensor(known)
            mask[row, longest - len(known) :] = 1
        model: Any = self.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = model.generate(
                input_ids=padded,
                attention_mask=mask,
                max_new_tokens=self.new_tokens,
                do_sample=True,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=0,
                pad_token_id=self.end,
                eos_token_id=self.end,
            )
        rows = made[:, longest:].tolist()
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    @property
    def end(self) -> int:
        """The token that ends a text; raises `ConfigError` for a tokeniser without one."""
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("Writer: the tokeniser has no eos_token, so no text would ever end.")
        return int(self.tokenizer.eos_token_id)


def sentences(text: str) -> list[str]:
    """A text, cut after every full stop, question mark and exclamation mark."""
    return [sentence for sentence in SENTENCE.split(text.strip()) if sentence]


def extend(
    writer: Writer, roles: Roles, instructions: Sequence[str], texts: Sequence[str], *, seed: int
) -> list[str]:
    """A longer version of each text, in two stages, as the Extender `writer` writes it."""
    halves = [" ".join(s[: max(1, len(s) // 2)]) for s in map(sentences, texts)]
    tasks = list(zip(instructions, texts, strict=True))
    firsts = writer.write(
        [roles.ask_for_more(i, half) for (i, _), half in zip(tasks, halves, strict=True)],
        seed=2 * seed,
    )
    begun = [" ".join(s[: int(KEPT * len(s))]) for s in map(sentences, firsts)]
    rest = writer.write(
        [roles.ask_for_more(*task) + begin for task, begin in zip(tasks, begun, strict=True)],
        seed=2 * seed + 1,
    )
    return [f"{begin} {end}".strip() for begin, end in zip(begun, rest, strict=True)]


def why_rejected(short: str, long: str) -> str | None:
    """What is wrong with an extension, in a few words; None for one to learn from."""
    words = long.split()
    if len(words) < LONGER * len(short.split()):
        return "not longer"
    if not long.endswith((".", "!", "?", '"', ")")):
        return "not at its end"
    if repeated_ngrams([word.lower() for word in words], REPEATED) > 0:
        return "repeats itself"
    return None


@dataclass(frozen=True)
class Round:
    """What one round made: per instruction the short text, and the long one or None where none was accepted."""

    instructions: tuple[str, ...]
    short: tuple[str, ...]
    long: tuple[str | None, ...]

    def accepted(self) -> list[tuple[str, str, str]]:
        """Instruction, short text and long text of those that are learned from."""
        rows = zip(self.instructions, self.short, self.long, strict=True)
        return [(instruction, short, long) for instruction, short, long in rows if long is not None]


def lengthen(
    generator: Writer,
    extender: Writer,
    roles: Roles,
    instructions: Sequence[str],
    *,
    attempts: int = 3,
    seed: int = 0,
) -> Round:
    """The texts of one round: short ones by the generator, and the first of `attempts` extensions that is accepted."""
    short = generator.write([roles.ask(instruction) for instruction in instructions], seed=seed)
    long: list[str | None] = [None] * len(short)
    for attempt in range(attempts):
        open_rows = [row for row, text in enumerate(long) if text is None and short[row]]
        if not open_rows:
            break
        tried = extend(
            extender,
            roles,
            [instructions[row] for row in open_rows],
            [short[row] for row in open_rows],
            seed=seed + attempt + 1,
        )
        for row, text in zip(open_rows, tried, strict=True):
            if why_rejected(short[row], text) is None:
                long[row] = text
    return Round(tuple(instructions), tuple(short), tuple(long))


def learn(
    generator: Writer,
    extender: Writer,
    roles: Roles,
    made: Round,
    *,
    epochs: int,
    learning_rate: float,
    seed: int = 0,
) -> tuple[Writer, Writer]:
    """Both roles after training on a round, as new writers; the models given are trained in place, by LoRA.

    Raises `DataError` for a round of which no text was accepted.
    """
    accepted = made.accepted()
    if not accepted:
        raise DataError(
            "self_lengthen: no long text of the round was accepted, so there is nothing to learn. Give more "
            "instructions or attempts, or an extension prompt with an example."
        )
    draw = random.Random(seed)
    asked = [(roles.ask(instruction), long) for instruction, _, long in accepted]
    extended = [
        (roles.ask_for_more(instruction, _part(short, draw)), long)
        for instruction, short, long in accepted
    ]
    return (
        _tuned(generator, asked, epochs=epochs, learning_rate=learning_rate, seed=seed),
        _tuned(extender, extended, epochs=epochs, learning_rate=learning_rate, seed=seed),
    )


def _part(short: str, draw: random.Random) -> str:
    """Some sentences of a short text, at least one: so the Extender learns to fill in."""
    told = sentences(short)
    kept = [sentence for sentence in told if draw.random() < SHOWN]
    return " ".join(kept or told[:1])


def _tuned(
    writer: Writer,
    pairs: Sequence[tuple[str, str]],
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> Writer:
    from seqmix.train.loop import run
    from seqmix.train.parameters import merged, select_parameters
    from seqmix.train.plan import Plan

    examples = [_example(writer, prompt, answer) for prompt, answer in pairs]
    model = select_parameters(writer.model, "lora", seed=seed)
    plan = Plan(
        steps=epochs * len(examples),
        tokens_per_step=max(example["input_ids"].shape[1] for example in examples),
        learning_rate=learning_rate,
        warmup=0.1,
        weight_decay=0.0,
        seed=seed,
        progress=False,
    )
    run(model, lambda index: examples[index % len(examples)], plan)
    return dataclasses.replace(writer, model=merged(model).eval())


def _example(writer: Writer, prompt: str, answer: str) -> dict[str, Tensor]:
    """One row, in which the answer and its end are scored."""
    known, said = (
        writer.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)
    )
    ids = torch.tensor([[*known, *said, writer.end]])
    labels = ids.clone()
    labels[:, : len(known)] = IGNORED
    return {"input_ids": ids, "labels": labels}
