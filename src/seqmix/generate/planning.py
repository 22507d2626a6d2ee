"""Planning-guided decoding: a tree search over beginnings, judged by what their likely continuations are worth.

    value(a) = Q(a) + b p(a) sqrt(log N) / (1 + n(a)),      b = log((N + base + 1) / base) + exploration

Every node is a beginning of the text. Its children are the `candidates` likeliest next tokens a, of probability p(a).
From the root the search goes to the child of the highest value until it meets one that was never visited; N counts
visits of the node, from one on, and n those of the child. That beginning is continued by beam search, the whole text is
worth `reward(ids)`, and Q of all nodes above becomes the most that any text below has been worth.
Zhang et al. 2023 (arXiv:2303.05510), algorithm 1, with the constants of its authors' code. One thing differs: a part of
the tree that has been seen whole is not visited again, for its texts are known.

The search and the model share a memory: no beginning is read twice, and a child that the continuation of its parent
goes through takes that continuation as its own. `rollouts` counts the texts that are really searched for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from seqmix.generate._memory import Memory
from seqmix.generate._method import Constraint, Continuation, Method, Task, at_least
from seqmix.generate._reader import Reader
from seqmix.generate.beams import Beams


@dataclass(frozen=True, kw_only=True)
class Planning(Method):
    """The text of the highest `reward` that a tree search of so many `rollouts` finds.

    `reward` says what a whole text of these new tokens is worth, such as the share of tests that a program passes; it
    should not exceed one by much, or `exploration` should grow with it.
    """

    reward: Callable[[list[int]], float]
    rollouts: int = 32
    candidates: int = 3
    width: int = 1  # of the beam search that continues a beginning
    exploration: float = 4.0
    base: float = 10.0

    def __post_init__(self) -> None:
        for name in ("rollouts", "candidates", "width"):
            at_least(name, getattr(self, name), 1)
        at_least("exploration", self.exploration, 0.0)
        at_least("base", self.base, 1e-6)

    def decode(self, reader: Reader, task: Task) -> list[Continuation]:
        """The `texts` best of the texts found: by reward, and of equal reward the likeliest."""
        return [found.text for found in self.search(Memory(reader), task)[: task.texts]]

    def search(self, memory: Memory, task: Task) -> list[Found]:
        """All texts found, the best first; fewer than `rollouts` if the tree has been seen whole."""
        found: dict[tuple[int, ...], Found] = {}
        root = _Node([], 1.0, 0.0)
        self._expand(root, memory, task)
        searched = 0
        while searched < self.rollouts and not root.is_done:
            path = self._select(root)
            node, parent = path[-1], path[-2]
            node.rollout = _inherited(node, parent)
            if node.rollout is None:
                node.rollout = self._rollout(node, memory, task)
                searched += 1
            text = node.rollout
            if tuple(text.ids) not in found:
                found[tuple(text.ids)] = Found(text, self.reward(text.ids))
            self._expand(node, memory, task)
            for each in path:
                each.visits += 1
                each.best = max(each.best, found[tuple(text.ids)].reward)
            for each in reversed(path):
                each.is_done = all(child.is_done for child in each.children)
        return sorted(found.values(), key=lambda one: (-one.reward, -one.text.log_probability))

    def _select(self, root: _Node) -> list[_Node]:
        """The nodes from the root to one that was never visited, each the child of the highest value."""
        path = [root]
        while path[-1].visits or len(path) == 1:
            node = path[-1]
            total = node.visits + 1
            weight = math.log((total + self.base + 1) / self.base) + self.exploration
            weight *= math.sqrt(math.log(total))

            def value(child: _Node, weight: float = weight) -> float:
                return child.best + weight * child.probability / (1 + child.visits)

            path.append(max((child for child in node.children if not child.is_done), key=value))
        return path

    def _expand(self, node: _Node, memory: Memory, task: Task) -> None:
        if task.is_finished(node.ids):
            return
        ids = torch.tensor([task.prompt[0].tolist() + node.ids])
        logits = task.allowed(memory.read(ids).logits[:, -1], [node.ids])
        logs, tokens = logits[0].float().log_softmax(-1).topk(min(self.candidates, logits.shape[1]))
        node.children = [
            _Node([*node.ids, token], math.exp(log), node.log_probability + log)
            for token, log in zip(tokens.tolist(), logs.tolist(), strict=True)
            if log > -math.inf
        ]

    def _rollout(self, node: _Node, memory: Memory, task: Task) -> Continuation:
        """The likeliest text that beam search finds behind a beginning."""
        if task.is_finished(node.ids):
            return task.continuation(node.ids, node.log_probability)
        rest = Beams(width=self.width).decode(memory, _behind(node.ids, task))[0]
        total = node.log_probability + rest.log_probability
        return task.continuation([*node.ids, *rest.ids], total)


@dataclass(frozen=True)
class Found:
    """A text and what it is worth."""

    text: Continuation
    reward: float


@dataclass
class _Node:
    ids: list[int]
    probability: float  # of the last token
    log_probability: float  # of all
    visits: int = 0
    best: float = 0.0  # reward of a text below
    children: list[_Node] = field(default_factory=list)
    rollout: Continuation | None = None
    is_done: bool = False  # every text below has been seen


def _inherited(node: _Node, parent: _Node) -> Continuation | None:
    """The parent's continuation where it goes through the node."""
    known = parent.rollout
    return known if known and known.ids[: len(node.ids)] == node.ids else None


def _behind(ids: list[int], task: Task) -> Task:
    """The task of continuing `ids`, in which ends and constraint see the whole text."""
    return replace(
        task,
        prompt=torch.tensor([task.prompt[0].tolist() + ids]),
        new_tokens=task.new_tokens - len(ids),
        texts=1,
        stop=lambda rest: task.is_ended([*ids, *rest]),
        constraint=None if task.constraint is None else _Behind(task.constraint, ids),
        emit=None,
    )


@dataclass(frozen=True)
class _Behind(Constraint):
    """What a constraint on whole texts means for what follows their beginning `ids`."""

    whole: Constraint
    ids: list[int]

    def allowed(self, ids: list[int], vocabulary: int, ends: frozenset[int]) -> Tensor:
        return self.whole.allowed([*self.ids, *ids], vocabulary, ends)

    def is_over(self, ids: list[int]) -> bool:
        return self.whole.is_over([*self.ids, *ids])
