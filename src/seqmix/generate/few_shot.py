"""Few-shot prompting: a few texts with their answers stand before a new text, and the model answers it alike.

    instruction, source text, target answer, source text, target answer, ..., source new text, target ?

What stands before the new text is the same for all, so it is read once, and its state is where all texts go on from;
texts of equally many tokens are read and answered as one batch. The answer is the likeliest token each time, up to the
end of the line.
Garcia et al. 2023 (arXiv:2302.01398) translate so with a model that has never seen pairs of texts; Dukic et al. 2025
(arXiv:2509.00921) label words so, under a constraint, and fine-tune on the answers, for which `training_row` is.

Axes: N rows, T time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqmix.core.errors import DataError
from seqmix.core.state import State
from seqmix.data.packing import IGNORED
from seqmix.generate._method import Constraint, Task, at_least
from seqmix.generate._reader import Reader, reader_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 16  # that are answered as one batch
END = "\n"


@dataclass(frozen=True)
class FewShot:
    """How texts and answers are written: `source` before a text, `target` before an answer, a line for each.

    `demonstrations` are pairs of a text and its answer; the `instruction` stands before them, if there is one.
    """

    demonstrations: Sequence[tuple[str, str]] = ()
    source: str = "Text:"
    target: str = "Answer:"
    instruction: str = ""

    def __post_init__(self) -> None:
        parts = [part for pair in self.demonstrations for part in pair]
        for part in [*parts, self.source, self.target]:
            if END in part or not part:
                raise DataError(f"FewShot: {part!r}, wanted one line of text, not empty.")

    def before(self) -> str:
        """What stands before every new text."""
        head = f"{self.instruction}{END}{END}" if self.instruction else ""
        return head + "".join(
            f"{self.query(text)} {answer}{END}{END}" for text, answer in self.demonstrations
        )

    def query(self, text: str) -> str:
        """A new text, and where its answer is wanted."""
        return f"{self.source} {text}{END}{self.target}"

    def training_row(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """The demonstrations as one row [1, T] whose labels are the answers alone.

        Every answer is learnt behind the texts and answers before it, which are its demonstrations.
        """
        ids = _ids(tokenizer, f"{self.instruction}{END}{END}") if self.instruction else []
        labels = [IGNORED] * len(ids)
        for text, answer in self.demonstrations:
            query = _ids(tokenizer, self.query(text))
            answered = _ids(tokenizer, f" {answer}{END}")
            behind = _ids(tokenizer, END)
            ids += query + answered + behind
            labels += [IGNORED] * len(query) + answered + [IGNORED] * len(behind)
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


def nearest(pool: Sequence[tuple[str, str]], text: str, count: int) -> list[tuple[str, str]]:
    """The `count` demonstrations of `pool` whose texts are most alike to `text`, the most alike last.

    Alike are texts that share runs of three characters: 2 common / (runs of both).
    """
    at_least("count", count, 0)
    wanted = _runs(text)

    def alike(pair: tuple[str, str]) -> float:
        runs = _runs(pair[0])
        return 2 * (runs & wanted).total() / max(1, runs.total() + wanted.total())

    ranked = sorted(pool, key=alike)
    return ranked[max(0, len(ranked) - count) :]


def _runs(text: str) -> Counter[str]:
    text = f"  {text.lower()}  "
    return Counter(text[i : i + 3] for i in range(len(text) - 2))


def answer_texts(
    model: PreTrainedModel | Reader,
    tokenizer: PreTrainedTokenizerBase,
    prompt: FewShot,
    texts: Sequence[str],
    *,
    new_tokens: int,
    constraints: Sequence[Constraint] | None = None,
) -> list[str]:
    """The answers to `texts`, each of at most `new_tokens` tokens and of one line.

    `constraints` holds one for each text. Raises `DataError` for a prompt that begins with nothing.
    """
    at_least("new_tokens", new_tokens, 1)
    reader = reader_of(model)
    head = _ids(tokenizer, prompt.before(), begins=True)
    queries = [_ids(tokenizer, prompt.query(text)) for text in texts]
    groups: dict[int, list[int]] = defaultdict(list)
    for place, query in enumerate(queries):
        groups[len(query)].append(place)
    answers = [""] * len(texts)
    with torch.inference_mode():
        state = reader.read(torch.tensor([head])).state if head else None
        for alike in groups.values():
            for start in range(0, len(alike), ROWS):
                places = alike[start : start + ROWS]
                tasks = [
                    Task(
                        prompt=torch.tensor([queries[place]]),
                        new_tokens=new_tokens,
                        stop=lambda ids: END in tokenizer.decode(ids[-1:]),
                        constraint=None if constraints is None else constraints[place],
                    )
                    for place in places
                ]
                for place, ids in zip(places, _likeliest(reader, state, tasks), strict=True):
                    answers[place] = tokenizer.decode(ids, skip_special_tokens=True)
    return [text.split(END)[0].strip() for text in answers]


def _likeliest(reader: Reader, state: State, tasks: list[Task]) -> list[list[int]]:
    """The likeliest token each time, of prompts of one length behind one state."""
    if state is not None:
        state = reader.select(state, [0] * len(tasks))
    logits, _, state = reader.read(torch.cat([task.prompt for task in tasks]), state)
    written: list[list[int]] = [[] for _ in tasks]
    rows = list(range(len(tasks)))
    while True:
        for place, row in enumerate(rows):
            allowed = tasks[row].allowed(logits[place : place + 1, -1], [written[row]])
            written[row].append(int(allowed.argmax()))
        going = [
            place for place, row in enumerate(rows) if not tasks[row].is_finished(written[row])
        ]
        if not going:
            return written
        if len(going) < len(rows):
            state, rows = reader.select(state, going), [rows[place] for place in going]
        last = torch.tensor([written[row][-1:] for row in rows])
        logits, _, state = reader.read(last, state)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, begins: bool = False) -> list[int]:
    """The tokens of a part of a text, with those that begin a text where it does."""
    ids: list[int] = tokenizer(text, add_special_tokens=begins).input_ids if text or begins else []
    return ids
