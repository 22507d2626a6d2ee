"""Speculative decoding with a tree of guesses: the model reads all of them at once and follows what it agrees with.

    from the text on: draw a token as plain decoding does; where a branch begins with it, go on from there

The draws are those of plain decoding, so texts are the same, sampled ones too. A recurrent layer reads a tree in one
pass as attention does (`Mixer.read_tree`); what it reads are the tokens that were accepted last, and after them the
guesses, and its state is the one before the guesses. Wu et al. 2025 (STree, arXiv:2505.14969); trees: Miao
et al. 2023 (SpecInfer, arXiv:2305.09781); the likeliest nodes: Li et al. 2024 (EAGLE-2, arXiv:2406.16858).

Axes: T tokens, V vocabulary, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from seqmix.core.tree import Tree
from seqmix.generate._method import Continuation, Method, Task, at_least
from seqmix.generate._reader import Reader, reader_of
from seqmix.generate.sampling import GREEDY, Sampling, draw, random_numbers
from seqmix.generate.speculative import Speculated

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Guesses(NamedTuple):
    """Tokens that may follow a text, as nodes: `parents[t]` is the node before node t, or -1 for the text."""

    parents: list[int]
    tokens: list[int]


class TreeDraft(ABC):
    """The drafter of one text."""

    @abstractmethod
    def guess(self, written: list[int], features: Tensor) -> Guesses:
        """What may follow the new tokens `written`, which only grow from call to call; it may be nothing.

        `features [T, D]` are the model's, of the tokens of prompt and text that it has read since the last call:
        in all calls together, of every token but the last of `written`.
        """


class TreeDrafter(ABC):
    """Guesses trees of tokens."""

    @abstractmethod
    def start(self, task: Task) -> TreeDraft:
        """The drafter of one text of this task."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large a tree is: `depth` guesses on a path, `width` at each depth, and of all of them so many `nodes`."""

    depth: int = 4
    width: int = 3
    nodes: int = 8

    def __post_init__(self) -> None:
        for name in ("depth", "width", "nodes"):
            at_least(name, getattr(self, name), 1)


def grow(shape: Shape, logits: Tensor, extend: Callable[[list[int], list[int]], Tensor]) -> Guesses:
    """A tree of likely nodes, each with the product of the chances on its path.

    `logits [1, V]` are of what follows the text. `extend(rows, tokens)` makes a token each follow these rows of the
    last call, and gives the logits [rows, V] after it. A node is never likelier than its parent, so the likeliest
    nodes are a tree.
    """
    guesses, scores = Guesses([], []), []
    rows: list[int] = []
    tokens: list[int] = []
    level, so_far = [-1], torch.zeros(1)  # nodes that the rows stand for, and their scores
    for depth in range(shape.depth):
        if depth:
            logits = extend(rows, tokens)
        logs = so_far.unsqueeze(-1) + logits.float().log_softmax(-1).cpu()
        so_far, places = logs.flatten().topk(min(shape.width, logs.numel()))
        rows = (places // logs.shape[-1]).tolist()
        tokens = (places % logs.shape[-1]).tolist()
        guesses.parents.extend(level[row] for row in rows)
        level = list(range(len(guesses.tokens), len(guesses.tokens) + len(rows)))
        guesses.tokens.extend(tokens)
        scores += so_far.tolist()
    likeliest = sorted(range(len(scores)), key=lambda node: -scores[node])[: shape.nodes]
    place = {node: i for i, node in enumerate(sorted(likeliest))}
    return Guesses(
        [place.get(guesses.parents[node], -1) for node in place],
        [guesses.tokens[node] for node in place],
    )


class TreeModel(TreeDrafter):
    """The likeliest continuations under another causal language model with the same tokens, such as a smaller one."""

    def __init__(self, model: PreTrainedModel | Reader, shape: Shape | None = None) -> None:
        self.model = model
        self.shape = shape or Shape()

    def start(self, task: Task) -> TreeDraft:
        return _ModelTree(reader_of(self.model), self.shape, task.prompt[0].tolist())


class _ModelTree(TreeDraft):
    def __init__(self, reader: Reader, shape: Shape, prompt: list[int]) -> None:
        self.reader, self.shape, self.prompt = reader, shape, prompt
        self.state = None  # after the first `seen` tokens of prompt and text
        self.seen = 0

    def guess(self, written: list[int], features: Tensor) -> Guesses:
        text = self.prompt + written
        new = torch.tensor([text[self.seen :]])
        logits, _, self.state = self.reader.read(new, self.state)
        self.seen = len(text)
        state = self.state

        def extend(rows: list[int], tokens: list[int]) -> Tensor:
            nonlocal state
            chosen = self.reader.select(state, rows)
            logits, _, state = self.reader.read(torch.tensor(tokens).unsqueeze(-1), chosen)
            return logits[:, -1]

        return grow(self.shape, logits[:, -1], extend)


class TreeLookup(TreeDrafter):
    """All that followed when the last few tokens were there before, the latest places first; costs nothing.

    As `PromptLookup`, it looks for the last `longest` tokens, then for fewer, and takes `depth` tokens from each place,
    until there are `nodes`.
    """

    def __init__(self, longest: int = 3, shape: Shape | None = None) -> None:
        at_least("longest", longest, 1)
        self.longest, self.shape = longest, shape or Shape()

    def start(self, task: Task) -> TreeDraft:
        return _LookupTree(self.longest, self.shape, task.prompt[0].tolist())


class _LookupTree(TreeDraft):
    def __init__(self, longest: int, shape: Shape, prompt: list[int]) -> None:
        self.longest, self.shape, self.prompt = longest, shape, prompt

    def guess(self, written: list[int], features: Tensor) -> Guesses:
        text = self.prompt + written
        found: dict[tuple[int, int], int] = {}  # the node of a token after a node
        for length in range(min(self.longest, len(text) - 1), 0, -1):
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] != text[-length:]:
                    continue
                node = -1
                for token in text[start + length : start + length + self.shape.depth]:
                    if len(found) == self.shape.nodes and (node, token) not in found:
                        break
                    node = found.setdefault((node, token), len(found))
        return Guesses([parent for parent, _ in found], [token for _, token in found])


@dataclass(frozen=True, kw_only=True)
class SpeculativeTree(Method):
    """Decodes as `sampling` does, checking a tree of the drafter's guesses at a time."""

    drafter: TreeDrafter
    sampling: Sampling = GREEDY

    def decode(self, reader: Reader, task: Task) -> list[Continuation]:
        """`texts` continuations, one after another, with random numbers of their own."""
        return [self._text(reader, task, task.seed + place) for place in range(task.texts)]

    def _text(self, reader: Reader, task: Task, seed: int) -> Speculated:
        prompt = task.prompt[0].tolist()
        draft, source = self.drafter.start(task), random_numbers(seed)
        written: list[int] = []
        likelihood, checks = 0.0, 0
        state, unread, guesses = None, prompt, Guesses([], [])
        unknown = len(prompt)  # of the tokens of `unread`, those that were no nodes before
        while True:
            ids = torch.tensor([unread + guesses.tokens])
            if guesses.tokens:
                reading = reader.read_tree(ids, state, Tree(guesses.parents))
            else:
                reading = reader.read(ids, state)
            state = reading.state
            checks += bool(written)  # the prompt is read without guesses
            follows = {key: node for node, key in enumerate(zip(*guesses, strict=True))}
            places = list(range(len(unread) - unknown, len(unread)))
            first, node, unread = len(unread), -1, []
            while True:
                last = task.allowed(reading.logits[:, node + 1], [written])
                token = draw(self.sampling.probabilities(last, prompt, [written])[0], source)
                written.append(token)
                unread.append(token)
                likelihood += float(last[0].float().log_softmax(-1)[token])
                if task.emit is not None:
                    task.emit(token)
                if task.is_finished(written):
                    return Speculated(written, likelihood, task.is_ended(written), checks)
                if (node, token) not in follows:
                    break
                node = follows[node, token]
                places.append(first + node)
            unknown = 1  # the last token; what was accepted before it were nodes
            guesses = draft.guess(written, reading.features[0, places])
