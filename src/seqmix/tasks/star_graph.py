"""Star graph: paths of several lengths cross at one node; say the way from the start of one of them to its end.

The edges come in random order, each a token of its own, then the goal and the start; the answer is the path without
its start, and the id after the nodes for its end. Whoever says the path in order has to know at the crossing which of
the ways out leads to the goal, before its nodes have been said. Graphs with the start at the crossing and arms of one
length: arXiv:2403.06963, section 4; with paths of several lengths that cross anywhere: arXiv:2505.05755,
there up to 5 paths of 12 nodes; both write an edge as two tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from seqmix.core.errors import ConfigError
from seqmix.data.packing import IGNORED
from seqmix.tasks._task import Task, TaskConfig, distinct, first_in_order


@dataclass(frozen=True, kw_only=True)
class Config(TaskConfig):
    """`plan`: at least so many edges lie between the crossing and the end of each path."""

    length: int = 24
    nodes: int = 20
    paths: int = 3
    shortest_path: int = 3  # in nodes
    longest_path: int = 5
    plan: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paths < 2 or not 1 <= self.plan < self.shortest_path <= self.longest_path:
            raise ConfigError(
                f"paths={self.paths}, plan={self.plan}, shortest_path={self.shortest_path}, longest_path="
                f"{self.longest_path}, wanted at least 2 paths and 1 <= plan < shortest <= longest."
            )
        if self.nodes < self.paths * self.longest_path + 1:
            raise ConfigError(
                f"nodes={self.nodes}, wanted at least paths * longest_path + 1 = "
                f"{self.paths * self.longest_path + 1}."
            )


class StarGraph(Task[Config]):
    """Ids are the nodes, the end of a path, a blank, and the edges. Chance is the share of ends among the answers."""

    Config = Config
    examples: ClassVar = {
        "arms": {"shortest_path": 4, "longest_path": 4, "length": 20},
        "two_paths": {"paths": 2, "nodes": 16},
    }

    @property
    def end(self) -> int:
        return self.config.nodes

    @property
    def blank(self) -> int:
        return self.config.nodes + 1

    @property
    def vocabulary(self) -> int:
        return self.first_edge + self.config.nodes**2

    @property
    def first_edge(self) -> int:
        return self.config.nodes + 2

    @property
    def answers(self) -> range:
        return range(self.config.nodes + 1)

    @property
    def answer_length(self) -> int:
        """Positions of the answer: the longest path without its start, and its end."""
        return self.config.longest_path

    @property
    def shortest(self) -> int:
        c = self.config
        return c.paths * (c.longest_path - 1) + 1 + c.longest_path

    def chance(self) -> float:
        return 2 / (self.config.shortest_path + self.config.longest_path)

    def draw(
        self, random: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        c = self.config
        names = distinct(random, rows, c.nodes, c.paths * c.longest_path + 1)
        paths = names[:, :-1].reshape(rows, c.paths, c.longest_path)
        shape = (rows, c.paths, 1)
        lengths = random.integers(c.shortest_path, c.longest_path + 1, size=shape)
        crossings = random.integers(lengths - c.plan)
        np.put_along_axis(paths, crossings, names[:, -1:, None], axis=2)
        edges = self.first_edge + c.nodes * paths[:, :, :-1] + paths[:, :, 1:]
        exists = np.arange(c.longest_path - 1) < lengths - 1
        edges = np.where(exists, edges, self.blank).reshape(rows, -1)
        keys = np.where(exists, random.random(exists.shape), -1.0).reshape(rows, -1)
        order = first_in_order(keys, keys.shape[1])
        edges = np.take_along_axis(edges, order, axis=1)
        path, last = paths[:, 0], lengths[:, 0] - 1
        place = np.arange(c.longest_path)
        inputs = np.full((rows, length), self.blank)
        answered = c.longest_path
        inputs[:, -answered - 1 - edges.shape[1] : -answered - 1] = edges
        inputs[:, -answered - 1] = np.take_along_axis(path, last, axis=1)[:, 0]
        inputs[:, -answered:] = np.where(place <= last, path, self.end)
        labels = np.full_like(inputs, IGNORED)
        following = np.concatenate([path[:, 1:], path[:, :1]], axis=1)
        answer = np.where(place < last, following, self.end)
        labels[:, -answered:] = np.where(place <= last, answer, IGNORED)
        return inputs, labels

    def oracle(self, inputs: Tensor) -> Tensor:
        """On from the start to the crossing, the only node with several ways out, and back to it from the goal."""
        answered = self.config.longest_path
        outputs = torch.full_like(inputs, self.end)
        for row, ids in enumerate(inputs.tolist()):
            *known, goal, start = ids[: -answered + 1]
            edges = [token - self.first_edge for token in known if token != self.blank]
            onward: dict[int, list[int]] = {}
            back = {}
            for one, other in (divmod(edge, self.config.nodes) for edge in edges):
                onward.setdefault(one, []).append(other)
                back[other] = one
            way = [start]
            while len(onward[way[-1]]) == 1:
                way.append(onward[way[-1]][0])
            rest = [goal]
            while back[rest[-1]] != way[-1]:
                rest.append(back[rest[-1]])
            answer = (way + rest[::-1])[1:]
            outputs[row, len(ids) - answered : len(ids) - answered + len(answer)] = torch.tensor(
                answer
            )
        return outputs


TASK = StarGraph
