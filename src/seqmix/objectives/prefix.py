"""Prefix language modelling: a text is cut at a random place, and its end is predicted from its beginning.

    loss = -mean_{t >= P} log p(x_t | x_<t),   P uniform from 1 to T - 1

The beginning is only read, so a model may read it in both directions: `prefix_attention`, or an encoder-decoder.
Raffel et al. 2020 (arXiv:1910.10683), section 3.2.1.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from seqmix.objectives._objective import Inputs, TargetObjective, check_text


class Prefix(TargetObjective):
    """One cut for all rows of a batch."""

    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        check_text("prefix", ids, 2)
        cut = int(torch.randint(1, ids.shape[1], (), generator=generator))
        return {"source": ids[:, :cut], "target": ids[:, cut:]}


OBJECTIVE = Prefix
