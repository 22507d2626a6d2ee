"""Parts of a layer that must keep their digits in mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(like: Tensor) -> AbstractContextManager[None]:
    """Inside, autocast leaves products on the device of `like` in the dtype of their factors.

    For kernels, decays, routing scores and states, whose errors grow with the text or change a choice.
    """
    device = like.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
