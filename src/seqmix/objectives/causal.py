"""Causal language modelling: every token is predicted from those before it.

    loss = -mean_t log p(x_t | x_<t)

For `SeqmixForCausalLM` with causal mixers. Radford et al. 2018, section 3.1.
"""

from __future__ import annotations

from torch import Generator, Tensor

from seqmix.objectives._objective import Inputs, Objective, check_text


class Causal(Objective):
    """Nothing is random and nothing is hidden."""

    def inputs(self, ids: Tensor, generator: Generator) -> Inputs:
        check_text("causal", ids, 2)
        return {"input_ids": ids, "labels": ids}


OBJECTIVE = Causal
