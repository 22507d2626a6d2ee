"""Continuations of one text that share their beginnings: a tree with a token at every node.

Axes: T nodes, P paths, L tokens of the longest path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from seqmix.core.errors import RangeError


class Tree:
    """`parents[t]` is the node before node t, an earlier one, or -1 where t follows the text itself."""

    def __init__(self, parents: Sequence[int]) -> None:
        self.parents = list(parents)
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise RangeError(
                    f"Tree: `parents` of node {node} is {parent}, wanted an earlier node, or -1 for the text itself."
                )
        self._paths: list[list[int]] = []  # to every node, itself included
        for node, parent in enumerate(self.parents):
            self._paths.append([*(self._paths[parent] if parent >= 0 else []), node])

    def __len__(self) -> int:
        return len(self.parents)

    def before(self, node: int, count: int) -> list[int]:
        """The `count` places before a node, oldest first; negative ones are of the text, of which -1 is the last."""
        path = self._paths[node][:-1]
        return [*range(len(path) - count, 0), *path[max(0, len(path) - count) :]]

    @cached_property
    def depths(self) -> Tensor:
        """How many nodes are before each one, [T]."""
        return torch.tensor([len(path) - 1 for path in self._paths])

    @cached_property
    def ancestors(self) -> Tensor:
        """Whether node s is on the path to node t, itself included, [T, T] by t and s."""
        mask = torch.zeros(len(self), len(self), dtype=torch.bool)
        for node, path in enumerate(self._paths):
            mask[node, path] = True
        return mask

    @cached_property
    def paths(self) -> Tensor:
        """The nodes on the way to every leaf, [P, L]; shorter ones go on with the leaf."""
        inner = set(self.parents)
        ways = [path for node, path in enumerate(self._paths) if node not in inner]
        longest = max(map(len, ways))
        return torch.tensor([[*way, *[way[-1]] * (longest - len(way))] for way in ways])

    @cached_property
    def rows(self) -> Tensor:
        """A path that each node is on, [T]: node t is at `paths[rows[t], depths[t]]`."""
        found: dict[int, int] = {}
        for row, path in enumerate(self.paths.tolist()):
            found |= dict.fromkeys(path, row)
        return torch.tensor([found[node] for node in range(len(self))])
