"""Mixture of experts: every token goes through the few gated linear units that it scores highest.

    s = sigmoid(W_r x),   y = sum_{i in top k of s + b} w_i expert_i(x) + shared(x),   w_i = s_i / sum s

The bias b takes part in the choice alone. After every backward pass in training mode it is raised by
`balance_rate` for every expert that got less than its share of the tokens and lowered for those with more,
which balances the load without a term in the loss. With `active=1` the weight is the score itself:
otherwise it would be 1, and the router would not learn.
DeepSeek-AI 2024 (arXiv:2412.19437), section 2.1.2; Wang et al. 2024 (arXiv:2408.15664), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix.channels._channel import Channel, ChannelConfig
from seqmix.channels.glu import Config as ExpertConfig
from seqmix.channels.glu import GatedLinearUnit
from seqmix.core.cost import Cost, matmul_cost
from seqmix.core.errors import ConfigError
from seqmix.core.numerics import widen
from seqmix.layers.precision import full_precision


@dataclass(frozen=True, kw_only=True)
class Config(ChannelConfig):
    expansion: float = 4 / 3  # per expert: two cost as much as one whole unit
    experts: int = 4
    active: int = 2  # experts per token
    shared: int = 0  # experts' widths of one more unit that every token passes
    balance_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.active <= self.experts:
            raise ConfigError(
                f"mixture_of_experts: active={self.active} of experts={self.experts}, wanted from 1 to all."
            )
        if self.shared < 0 or self.balance_rate < 0:
            raise ConfigError(
                f"mixture_of_experts: shared={self.shared}, balance_rate={self.balance_rate}, "
                "wanted at least 0 for both."
            )


class MixtureOfExperts(Channel):
    """Parameters of all experts, cost of the active ones; deterministic."""

    Config = Config
    examples: ClassVar = {"one_expert_and_a_shared_one": {"active": 1, "shared": 1}}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, hidden = config.width, config.hidden
        self.router = nn.Linear(width, config.experts, bias=False)
        self.router.only_read = True  # widened before the product
        self.register_buffer("balance", torch.zeros(config.experts, dtype=torch.float32))
        self.experts = nn.ModuleList(
            GatedLinearUnit(ExpertConfig(width=width, hidden=hidden)) for _ in range(config.experts)
        )
        self.shared = None
        if config.shared:
            wider = ExpertConfig(width=width, hidden=hidden * config.shared)
            self.shared = GatedLinearUnit(wider)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # [tokens, D]
        router = widen(tokens, self.router.weight)
        with full_precision(x):  # rounded scores would choose other experts
            score = torch.sigmoid(F.linear(*router))
        chosen = (score.detach() + self.balance).topk(self.config.active, dim=-1).indices
        weight = score.gather(-1, chosen)
        if self.config.active > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out = expert(tokens[token]) * weight[token, place, None]
            y = y.index_add(0, token, out.to(y.dtype))
        if self.training and score.requires_grad:
            score.register_hook(lambda _: self._balance(chosen))
        return y.reshape(x.shape)

    @torch.no_grad()
    def _balance(self, chosen: Tensor) -> None:
        load = torch.bincount(chosen.flatten(), minlength=self.config.experts)
        share = chosen.numel() / self.config.experts
        self.balance += self.config.balance_rate * torch.sign(share - load).to(self.balance.dtype)

    def cost(self, length: int) -> Cost:
        """Predicted cost of `length` tokens in float32: the router, the active experts, the shared one."""
        total = matmul_cost(length, self.config.width, self.config.experts)
        total += self.experts[0].cost(length) * self.config.active
        return total if self.shared is None else total + self.shared.cost(length)


CHANNEL = MixtureOfExperts
