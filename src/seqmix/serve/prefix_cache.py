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
from seqmix.serve.state_folder import StateFolder


@dataclass(eq=False)
class Node:
    """The place after `length` tokens of a text."""

    length: int = 0
    parent: Node | None = None
    edge: tuple[int, ...] = ()
    addition: State = None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)

    def path(self) -> list[Node]:
        """The places on the way from the root, which is not one of them, to this one."""
        places = []
        node = self
        while node.parent is not None:
            places.append(node)
            node = node.parent
        return places[::-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for place in self.path() for token in place.edge)

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return num_bytes(self.addition) + 8 * len(self.edge)

    @property
    def state(self) -> State:
        """The state of one text at this place, which must be in memory; None at the root."""
        additions = [place.addition for place in self.path()]
        if not additions:
            return None
        return _combine(
            lambda parts: Growing(torch.cat([part.tensor for part in parts], dim=1)),
            lambda parts: parts[-1],
            additions,
        )

    def leave(self) -> None:
        """Leaves the tree."""
        if self.parent is not None and self.parent.children.get(self.edge) is self:
            del self.parent.children[self.edge]


class Level:
    """Places that are kept somewhere, with their bytes there, in the order of their use."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sizes: OrderedDict[Node, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, node: Node) -> bool:
        return node in self._sizes

    def put(self, node: Node, size: int) -> None:
        """A new place, as the one used last."""
        self._sizes[node] = size
        self.bytes += size

    def touch(self, node: Node) -> None:
        """Marks a place as the one used last, if it is kept here."""
        if node in self._sizes:
            self._sizes.move_to_end(node)

    def drop(self, node: Node) -> bool:
        """Takes out a place; False if it is not kept here."""
        if node not in self._sizes:
            return False
        self.bytes -= self._sizes.pop(node)
        return True

    def drop_oldest(self) -> Node:
        """Takes out the place that was not used for longest."""
        node, size = self._sizes.popitem(last=False)
        self.bytes -= size
        return node


class PrefixCache:
    """At most `limit` bytes of states in memory; the ones that were of use least recently go first.

    With a `folder`, every state is written there as well, within its limit and in the same order: what has left the
    memory, or was kept by an earlier server, is read when it is needed. A parent is never older than its children,
    so what goes has no children left.
    """

    def __init__(self, limit: int, folder: StateFolder | None = None) -> None:
        self.limit = limit
        self.folder = folder
        self.root = Node()
        self.read_states = 0  # from the folder
        self.read_tokens = 0
        self.held = Level()  # in memory
        self.saved = Level()  # in the folder
        if folder is not None:
            self._survey(folder)

    def find(self, tokens: Sequence[int]) -> Node:
        """The last place kept on the way along `tokens`; the root if there is none. `load` makes its state ready."""
        node, text = self.root, tuple(tokens)
        while True:
            lengths = sorted({len(edge) for edge in node.children}, reverse=True)
            edges = (text[node.length : node.length + length] for length in lengths)
            child = next((node.children[edge] for edge in edges if edge in node.children), None)
            if child is None:
                self._touch(node)
                return node
            node = child

    def load(self, node: Node) -> Node:
        """Reads from the folder what the state of `node` lacks; returns the last place before it that can be had."""
        for place in node.path():
            if place not in self.held:
                addition = None
                if self.folder and place in self.saved:
                    addition = self.folder.read(place.tokens)
                if addition is None:
                    self._forget(place)
                    return place.parent or self.root
                place.addition = addition
                self.held.put(place, place.size)
                self.read_states += 1
                self.read_tokens += len(place.edge)
        self._touch(node)
        self._shrink()
        return next((place for place in reversed(node.path()) if place in self.held), self.root)

    def add(self, node: Node, tokens: Sequence[int], state: State) -> Node:
        """Keeps the state of one text that goes on from `node` by `tokens`; returns the place after them.

        What is larger than the limit, or goes on from a place that was dropped meanwhile, is not kept: the
        answer is `node` itself.
        """
        edge = tuple(tokens)
        if not edge or not self.limit or self.load(node) is not node:
            return node
        if edge not in node.children:
            addition = _combine(
                lambda parts: Growing(parts[0].tensor[:, node.length :].clone()),
                lambda parts: parts[0].clone(),
                [state],
            )
            child = Node(node.length + len(edge), node, edge, addition)
            if child.size > self.limit:
                return node
            node.children[edge] = child
            self.held.put(child, child.size)
            self._save(child)
        return self.load(node.children[edge])

    def _save(self, node: Node) -> None:
        parent = node.parent or self.root
        has_parent = parent is self.root or parent in self.saved
        if self.folder and has_parent and node.size <= self.folder.limit:
            size = self.folder.write(node.tokens, parent.length, node.addition)
            if size:
                self.saved.put(node, size)

    def _touch(self, node: Node) -> None:
        """Marks a place and those before it as used."""
        for place in reversed(node.path()):
            self.held.touch(place)
            self.saved.touch(place)

    def _shrink(self) -> None:
        """Drops the oldest states beyond the limits; a place that is neither held nor saved leaves the tree."""
        while self.held.bytes > self.limit:
            node = self.held.drop_oldest()
            node.addition = None
            if node not in self.saved:
                node.leave()
        while self.folder and self.saved.bytes > self.folder.limit:
            node = self.saved.drop_oldest()
            self.folder.remove(node.tokens)
            if node not in self.held:
                node.leave()

    def _forget(self, node: Node) -> None:
        """Drops a place and all that go on from it."""
        for child in [*node.children.values()]:
            self._forget(child)
        self.held.drop(node)
        if self.saved.drop(node) and self.folder:
            self.folder.remove(node.tokens)
        node.leave()

    def _survey(self, folder: StateFolder) -> None:
        """Takes the states of the folder into the tree; those without their parent are of no use."""
        places: dict[tuple[int, ...], Node] = {(): self.root}
        found = sorted(folder.survey(), key=lambda kept: len(kept.tokens))
        for kept in found:
            parent = places.get(kept.tokens[: kept.parent])
            if parent is None:
                folder.remove(kept.tokens)
                continue
            node = Node(len(kept.tokens), parent, kept.tokens[kept.parent :])
            places[kept.tokens] = parent.children[node.edge] = node
            self.saved.put(node, kept.bytes)
        for kept in sorted(found, key=lambda kept: kept.written):
            if kept.tokens in places:
                self._touch(places[kept.tokens])
        self._shrink()


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
