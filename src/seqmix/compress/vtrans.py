"""VTrans: heads, neurons, whole sublayers and channels of the embedding go by masks with an information bottleneck.

    z = mu + sigma e,   e ~ N(0, 1)                              a mask on every unit, sublayer and channel
    loss = KL(p || p(z)) + strength sum_i c_i log(1 + mu_i^2 / sigma_i^2) / 2

p are the predictions of the whole model, p(z) those with masks, c_i the share of the weights that goes with mask i. The
second term bounds the information that passes a mask. Those with the smallest mu^2 / sigma^2 go until the budget is
met, a unit also where its sublayer's is small; the means of the others are multiplied into the weights.
Dutta, Gupta and Agarwal 2024 (arXiv:2406.05276), section 3, after Dai et al. 2018 (arXiv:1802.10399), section 3.
With `rate=0` only the masks learn, which is the paper's Faster-VTrans; few `windows` of text make Fast-VTrans.
Our reading: targets are the whole model's predictions alone, and weights c_i stand for the paper's constraint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Generic

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.compress._cut import M, channels_can_go, cut
from seqmix.compress._structure import (
    Place,
    Units,
    language_model,
    masked,
    parameters_per_unit,
    sublayer,
    units_of,
)
from seqmix.compress._transform import Calibration, Needs, Transform, Work
from seqmix.core.errors import ConfigError

START = -4.0  # log sigma^2 of a new mask
MASK_RATE = 0.05  # learning rate of masks
CHANNELS = (-1, "channels")  # the place of the masks on the residual stream


@dataclass(frozen=True, kw_only=True)
class VTrans(Transform):
    quick: ClassVar = {"steps": 2, "batch": 2}

    remove: float = 0.25  # share of the weights in blocks and embedding
    steps: int = 50  # of training
    batch: int = 4  # windows in a step
    rate: float = 0.0  # learning rate of the weights; 0: only the masks learn
    strength: float = 0.03  # of the bottleneck
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            not 0 <= self.remove < 1
            or min(self.steps, self.batch) < 1
            or min(self.rate, self.strength) < 0
        ):
            raise ConfigError(
                f"vtrans: remove={self.remove}, steps={self.steps}, batch={self.batch}, rate={self.rate}, "
                f"strength={self.strength}, wanted a share of at least 0 and below 1, at least 1 step and window, and "
                "nothing below 0."
            )

    def fit(self, model: M, data: Calibration, work: Work) -> M:
        pruned = self.learned(model, data, work).pruned(self.remove)
        spec = pruned.config.to_spec()
        work.notes["layout"], work.notes["channels"] = spec.layout, spec.width
        work.notes["weights left"] = weights(pruned) / weights(model)
        return pruned.train(model.training)

    def learned(self, model: M, data: Calibration, work: Work) -> Masks[M]:
        """Masks of a copy of the model after training, which serve every budget."""
        made = copy.deepcopy(model)
        masks = Masks(made)
        made.requires_grad_(self.rate > 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._train(model, made, masks, data, work)
        made.requires_grad_(True)
        return masks

    def _train(self, teacher: M, made: M, masks: Masks[M], data: Calibration, work: Work) -> None:
        groups = [{"params": masks.parameters(), "lr": MASK_RATE}]
        if self.rate:
            groups.append({"params": list(made.parameters()), "lr": self.rate})
        optimizer = torch.optim.Adam(groups)
        was_training = teacher.training
        teacher.eval()
        try:
            for _ in work.track(range(self.steps), "masks"):
                rows = torch.randint(len(data.windows), (self.batch,))
                ids = data.windows[rows].to(made.device)
                with torch.no_grad():
                    target = teacher(input_ids=ids).logits.float().log_softmax(-1)
                with masks.applied():
                    found = made.eval()(input_ids=ids).logits.float().log_softmax(-1)
                change = F.kl_div(found, target, reduction="none", log_target=True).sum(-1).mean()
                optimizer.zero_grad()
                (change + self.strength * masks.information()).backward()
                optimizer.step()
        finally:
            teacher.train(was_training)

    def needs(self, model: M, data: Calibration) -> Needs:
        tokens = self.steps * self.batch * data.windows.shape[1]
        copies = 4 if self.rate else 1
        return Needs(
            forward_tokens=tokens,
            training_tokens=tokens,
            memory_mb=4 * copies * sum(p.numel() for p in model.parameters()) / 2**20,
        )


@dataclass(eq=False)
class Masks(Generic[M]):
    """The masks of a model: means and log variances for its units, its sublayers and its channels."""

    model: M
    units: dict[Place, Units] = field(init=False)
    mean: dict[Place, Tensor] = field(init=False)
    variance: dict[Place, Tensor] = field(init=False)
    costs: dict[Place, Tensor] = field(init=False)  # shares of all weights

    def __post_init__(self) -> None:
        found = units_of(self.model)
        linear = {
            place: u
            for place, u in found.items()
            if u.entrances
            and all(
                isinstance(sublayer(self.model, place).get_submodule(e), nn.Linear)
                for e in u.entrances
            )
        }
        if not linear:
            raise ConfigError(
                "vtrans: no sublayer of this model has heads or neurons before a linear layer, which masks act on. "
                "Prune before other steps, or use finercut."
            )
        self.units = linear
        backbone, spec = language_model(self.model).backbone, language_model(self.model).spec
        whole, device = weights(self.model), next(self.model.parameters()).device
        shapes, self.costs = {}, {}
        for place, u in linear.items():
            size = parameters_per_unit(sublayer(self.model, place), u) / whole
            shapes[place] = u.count + 1  # the last one is the sublayer's
            self.costs[place] = torch.tensor([size] * u.count + [size * u.count], device=device)
        narrow = channels_can_go(spec, found) and spec.residual in ("pre", "parallel")
        if narrow and backbone.positions is None:
            shapes[CHANNELS] = spec.width
            self.costs[CHANNELS] = torch.full((spec.width,), 1 / spec.width, device=device)
        self.mean = {p: torch.ones(n, device=device, requires_grad=True) for p, n in shapes.items()}
        self.variance = {
            p: torch.full((n,), START, device=device, requires_grad=True) for p, n in shapes.items()
        }

    def parameters(self) -> list[Tensor]:
        return [*self.mean.values(), *self.variance.values()]

    def information(self) -> Tensor:
        """The bound, each mask's part weighted by its share of the weights."""
        parts = [
            (self.costs[place] * torch.log1p(self._ratio(place))).sum() / 2 for place in self.mean
        ]
        return torch.stack(parts).sum()

    def _ratio(self, place: Place) -> Tensor:
        return self.mean[place].square() * (-self.variance[place]).exp()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block, the model has the masks with new noise."""
        drawn = {
            place: mean + (self.variance[place] / 2).exp() * torch.randn_like(mean)
            for place, mean in self.mean.items()
        }
        channels = drawn.pop(CHANNELS, None)
        with ExitStack() as stack:
            stack.enter_context(masked(self.model, {p: z[:-1] * z[-1] for p, z in drawn.items()}))
            if channels is not None:
                for module in writers(self.model):
                    handle = module.register_forward_hook(lambda m, i, y: y * channels)
                    stack.callback(handle.remove)
                if language_model(self.model).spec.tied:
                    handle = language_model(self.model).head.register_forward_pre_hook(
                        lambda m, inputs: (inputs[0] * channels,)
                    )
                    stack.callback(handle.remove)
            yield

    def pruned(self, remove: float) -> M:
        """The model without what carries least, with the means of the other masks in its weights."""
        kept, channels = self._chosen(remove)
        return cut(self.folded(), kept, channels=channels)

    @torch.no_grad()
    def _chosen(self, remove: float) -> tuple[dict[Place, list[int]], list[int] | None]:
        """The units and channels that stay when a share of the weights has gone.

        With a share s of the weights gone with units and k of D channels gone, (1 - s)(1 - k / D) are left.
        """
        order = []
        for place in self.mean:
            ratio = self._ratio(place)
            if place != CHANNELS:
                ratio = torch.minimum(ratio[:-1], ratio[-1])
            order += [(float(r), place, number) for number, r in enumerate(ratio)]
        kept = {place: list(range(u.count)) for place, u in self.units.items()}
        width = len(self.mean[CHANNELS]) if CHANNELS in self.mean else 0
        channels = list(range(width))
        left = 1.0
        for _, place, number in sorted(order):
            if left * (len(channels) / width if width else 1.0) <= 1 - remove:
                break
            if place != CHANNELS:
                kept[place].remove(number)
                left -= float(self.costs[place][0])
            elif len(channels) > 1:
                channels.remove(number)
        return kept, channels if width else None

    @torch.no_grad()
    def folded(self) -> M:
        """A copy of the model with the means of the masks multiplied into its weights."""
        made = copy.deepcopy(self.model)
        for place, units in self.units.items():
            mean = (self.mean[place][:-1] * self.mean[place][-1]).repeat_interleave(units.size)
            for entrance in units.entrances:
                sublayer(made, place).get_parameter(f"{entrance}.weight").mul_(mean)
        if CHANNELS in self.mean:
            for module in writers(made):
                for parameter in module.parameters():
                    last = isinstance(module, nn.Embedding) or parameter.ndim == 1
                    mean = self.mean[CHANNELS]
                    parameter.mul_(mean if last else mean[:, None])
        return made


def writers(model: nn.Module) -> list[nn.Module]:
    """What writes to the residual stream: the embedding and the linear layers called `output`."""
    inside = language_model(model)
    layers = inside.backbone.blocks.named_modules()
    return [inside.embedding, *(module for name, module in layers if name.endswith(".output"))]


def weights(model: nn.Module) -> int:
    """The number of weights in the blocks and the embedding."""
    inside = language_model(model)
    return sum(p.numel() for m in (inside.backbone, inside.embedding) for p in m.parameters())


TRANSFORM = VTrans
