"""States of texts that were read before, so that a shared beginning is read once.

The texts form a tree. A node is a place in a text where a state was kept; it holds what the state has beyond
that of its parent: the new columns of what grows with the text (keys and values), and all of what does not (a
recurrent state, a convolution history). So attention, recurrences and hybrids are kept alike, and a beginning that
many texts share takes room once. Edges are the tokens themselves, so no two texts are ever mistaken.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from seqmix.core.state import Growing, State, num_bytes


@dataclass(eq=False)
class Node:
    """The place after `length` tokens of a text."""

    length: int = 0
    parent: Node | None = None
    edge: tuple[int, ...] = ()
    addition: State = None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """The state of one text at this place; None at the root."""
        additions = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            additions.append(node.addition)
            node = node.parent
        if not additions:
            return None
        return _combine(
            lambda parts: Growing(torch.cat([part.tensor for part in reversed(parts)], dim=1)),
            lambda parts: parts[0],
            additions,
        )


class PrefixCache:
    """At most `limit` bytes of states; the ones that were of use least recently go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self.root = Node()
        self._used: OrderedDict[Node, int] = OrderedDict()  # oldest first, with their bytes

    def __len__(self) -> int:
        return len(self._used)

    def find(self, tokens: Sequence[int]) -> Node:
        """The last place kept on the way along `tokens`; the root if there is none."""
        node, text = self.root, tuple(tokens)
        while True:
            lengths = sorted({len(edge) for edge in node.children}, reverse=True)
            edges = (text[node.length : node.length + length] for length in lengths)
            child = next((node.children[edge] for edge in edges if edge in node.children), None)
            if child is None:
                self._touch(node)
                return node
            node = child

    def add(self, node: Node, tokens: Sequence[int], state: State) -> Node:
        """Keeps the state of one text that goes on from `node` by `tokens`; returns the place after them.

        What is larger than the limit, or goes on from a place that was dropped meanwhile, is not kept: the
        answer is `node` itself.
        """
        edge = tuple(tokens)
        is_dropped = node is not self.root and node not in self._used
        if not edge or not self.limit or is_dropped:
            return node
        if edge in node.children:
            child = node.children[edge]
        else:
            addition = _combine(
                lambda parts: Growing(parts[0].tensor[:, node.length :].clone()),
                lambda parts: parts[0].clone(),
                [state],
            )
            size = num_bytes(addition) + 8 * len(edge)
            if size > self.limit:
                return node
            child = Node(node.length + len(edge), node, edge, addition)
            node.children[edge] = child
            self._used[child] = size
            self.bytes += size
        self._touch(child)
        self._shrink()
        return child if child in self._used else node

    def _touch(self, node: Node) -> None:
        """Marks a place and those before it as used; a parent is never older than its children."""
        place: Node | None = node
        while place is not None and place.parent is not None:
            self._used.move_to_end(place)
            place = place.parent

    def _shrink(self) -> None:
        while self.bytes > self.limit:
            node, size = self._used.popitem(last=False)
            self.bytes -= size
            if node.parent is not None:
                del node.parent.children[node.edge]


def _combine(
    growing: Callable[[list[Growing]], Growing],
    fixed: Callable[[list[torch.Tensor]], torch.Tensor],
    states: list[Any],
) -> State:
    """One state out of several of the same nesting, by one function per kind of tensor."""
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Growing):
        return growing(states)
    if isinstance(first, torch.Tensor):
        return fixed(states)
    if isinstance(first, dict):
        return {name: _combine(growing, fixed, [s[name] for s in states]) for name in first}
    return type(first)(_combine(growing, fixed, list(parts)) for parts in zip(*states, strict=True))
