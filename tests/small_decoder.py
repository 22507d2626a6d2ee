"""A small language model with weights that are not small, and how it decodes."""

import torch

from seqmix.models.hf import create


def build(layout, dtype=torch.float32, width=60):
    model = create(layout, width=width, heads=6, vocabulary=50).eval().model
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15, generator=generator)
    return model.to(dtype)


def decode(model, ids, first, pieces):
    """Logits of all tokens, the first ones read at once and the others in pieces."""
    with torch.inference_mode():
        logits, state = model(ids[:, :first])
        found, place = [logits], first
        for length in pieces:
            logits, state = model(ids[:, place : place + length], state)
            found.append(logits)
            place += length
    return torch.cat(found, dim=1), state


def tokens(rows, length):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))
