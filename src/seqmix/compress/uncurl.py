"""UNCURL: experts that the router treats alike on a task's text are merged, so that fewer are left.

In every mixture of experts, on the router's logits s [tokens, E] of the calibration text:

    affinity of experts i, j = (1 + correlation of s_i and s_j) / 2
    E / factor clusters by normalised spectral clustering of the affinities
    expert of a cluster C = sum over c in C of n_c P_c(expert c) / sum n_c,   n_c = tokens that chose c

P_c orders the hidden neurons of c like those of the cluster's most chosen expert. The router's rows (and the biases
that balance the load) are averaged with the same weights.
Sarkar et al. 2024 (arXiv:2409.01483), UNCURL. The paper's text was not at hand: spectral clustering of router logits in
every layer, alignment by permutations and merging weighted by activations are from summaries of it; the affinity, a
greedy matching of neurons by the cosine of their weights, and the averaged router are our reading.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.channels.mixture_of_experts import MixtureOfExperts
from seqmix.compress._activations import watched
from seqmix.compress._cut import M, cut
from seqmix.compress._structure import Place, sublayer, units_of
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError

ROUNDS = 50  # of k-means at most


@dataclass(frozen=True, kw_only=True)
class Uncurl(Transform):
    quick: ClassVar = {"tokens": 128}

    factor: float = 2.0  # by which the number of experts falls
    tokens: int = 4096  # of the task's text

    def __post_init__(self) -> None:
        if self.factor < 1 or self.tokens < 2:
            raise ConfigError(
                f"uncurl: factor={self.factor}, tokens={self.tokens}, wanted a factor of at least 1 and at least 2 "
                "tokens."
            )

    @torch.no_grad()
    def fit(self, model: M, data: Calibration, work: Work) -> M:
        places = mixtures(model)
        ids = data.first(self.tokens).to(model.device)
        merged = copy.deepcopy(model).eval()
        layers = {f"{n} {part}": sublayer(merged, (n, part)) for n, part in places}
        inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        with watched(layers, lambda name, x: inputs[name].append(x.flatten(0, -2))):
            for rows in work.track(ids.split(8), "routing"):
                merged(input_ids=rows)
        kept, notes = {}, {}
        for place in places:
            name = f"{place[0]} {place[1]}"
            layer = layers[name]
            assert isinstance(layer, MixtureOfExperts)
            x = torch.cat(inputs[name])
            logits = F.linear(x, layer.router.weight).float()
            chosen = (logits.sigmoid() + layer.balance).topk(layer.config.active, dim=-1).indices
            load = torch.bincount(chosen.flatten(), minlength=layer.config.experts)
            count = max(layer.config.active, round(layer.config.experts / self.factor))
            clusters = spectral_clusters((1 + correlations(logits)) / 2, count)
            kept[place] = sorted(_merge(layer, c, load) for c in clusters)
            notes[name] = {"load": load.tolist(), "clusters": clusters}
        work.notes["experts"] = notes
        return cut(merged.train(model.training), kept)

    def needs(self, model: M, data: Calibration) -> Needs:
        """The inputs of all mixtures are held."""
        held = self.tokens * len(mixtures(model)) * model.config.to_spec().width
        return Needs(
            forward_tokens=self.tokens,
            memory_mb=4 * (held + sum(p.numel() for p in model.parameters())) / 2**20,
        )


def mixtures(model: nn.Module) -> list[Place]:
    """The places of all mixtures of experts; raises `ConfigError` for a model without."""
    places = [place for place, units in units_of(model).items() if units.experts is not None]
    if not places:
        raise ConfigError(
            "uncurl: this model has no mixture of experts whose layers are as they were built. Merge before other "
            "steps, or use optin or magnitude for other channel mixers."
        )
    return places


def correlations(x: Tensor) -> Tensor:
    """The correlation of every two columns of x [N, E]: [E, E]."""
    unit = F.normalize((x - x.mean(0)).double(), dim=0)
    return unit.T @ unit


def spectral_clusters(affinity: Tensor, count: int) -> list[list[int]]:
    """`count` groups of the rows of a symmetric matrix of affinities [E, E].

    k-means on the rows, of length 1, of the eigenvectors of D^-1/2 A D^-1/2 with the largest eigenvalues
    (Ng, Jordan and Weiss 2001), from the centres that lie farthest from each other; no group is empty.
    """
    scale = affinity.sum(-1).rsqrt()
    _, vectors = torch.linalg.eigh(scale[:, None] * affinity * scale)
    points = F.normalize(vectors[:, -count:], dim=-1)
    first = [0]
    while len(first) < count:
        first.append(int(torch.cdist(points, points[first]).amin(-1).argmax()))
    centres, groups = points[first], torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        distance = torch.cdist(points, centres)
        new = distance.argmin(-1)
        for empty in set(range(count)) - set(new.tolist()):
            alone = torch.bincount(new, minlength=count)[new] == 1
            own = distance.gather(1, new[:, None])[:, 0].masked_fill(alone, -1.0)
            new[own.argmax()] = empty
        if torch.equal(new, groups):
            break
        groups = new
        centres = torch.stack([points[groups == group].mean(0) for group in range(count)])
    return [(groups == group).nonzero().flatten().tolist() for group in range(count)]


def _merge(layer: MixtureOfExperts, cluster: list[int], load: Tensor) -> int:
    """Writes the average of a cluster into its most chosen expert, and returns that one's number."""
    weight = (load[cluster].double() + 1e-6).to(layer.router.weight.dtype)
    weight = weight / weight.sum()
    leader = cluster[int(weight.argmax())]
    like = _neurons(layer.experts[leader])
    neurons = torch.zeros_like(like)
    for member, share in zip(cluster, weight, strict=True):
        mine = _neurons(layer.experts[member])
        neurons += share * mine[matching(like, mine)]
    for part, tensor in zip(_parts(layer.experts[leader]), neurons.unbind(1), strict=True):
        part.copy_(tensor)
    layer.router.weight[leader] = weight @ layer.router.weight[cluster]
    layer.balance[leader] = weight.float() @ layer.balance[cluster]
    return leader


def _parts(expert: nn.Module) -> list[Tensor]:
    """The weights of a gated linear unit, each [hidden, width]."""
    gate, up, output = (expert.get_parameter(f"{name}.weight") for name in ("gate", "up", "output"))
    return [gate, up, output.T]


def _neurons(expert: nn.Module) -> Tensor:
    """All weights of every hidden neuron: [hidden, 3, width]."""
    return torch.stack(_parts(expert), dim=1)


def matching(first: Tensor, second: Tensor) -> Tensor:
    """For every row of `first` [H, ...] another row of `second`, the pairs of highest cosine first: numbers [H]."""
    a, b = (F.normalize(rows.flatten(1), dim=-1) for rows in (first, second))
    similarity = a @ b.T
    found = torch.full((len(a),), -1)
    while bool((found < 0).any()):
        best = similarity.argmax(-1)
        rows = torch.arange(len(a))
        mutual = (similarity.argmax(0)[best] == rows) & (found < 0)
        found[mutual] = best[mutual]
        similarity[mutual] = -torch.inf
        similarity[:, best[mutual]] = -torch.inf
    return found


TRANSFORM = Uncurl
