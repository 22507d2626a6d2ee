"""The decoder knows of a text what the state vector of its last token says, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqmix.core.errors import ConfigError, RangeError
from seqmix.generate import Beams
from seqmix.generate.future_tokens import FutureTokenReader
from seqmix.generate.sampling import GREEDY
from seqmix.models.backbone import ModelSpec
from seqmix.models.future_tokens import FutureTokenModel
from seqmix.objectives import OBJECTIVES
from seqmix.testing.models import close, draw

SIZES = {"width": 16, "heads": 2, "vocabulary": 41}


def build(layout="mamba2, attention", **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = FutureTokenModel(ModelSpec(layout=layout, **SIZES), **options).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model


@torch.no_grad()
def test_loss_is_that_of_decoding_every_scored_state_by_itself():
    model, ids = build(blocks=2), draw(2, 14)
    kind = OBJECTIVES.get("future_tokens")
    objective = kind(kind.Config(ahead=3, decay=0.5, every=4))
    inputs = objective.inputs(ids, torch.Generator().manual_seed(0))
    states, _ = model.read(ids)
    losses = []
    for row in range(2):
        for t in inputs["places"].tolist():
            for j in range(1, 4):
                logits = model.logits(states[row, t][None], ids[row, t + 1 : t + j][None])
                losses.append(F.cross_entropy(logits[0, -1], ids[row, t + j]))
    by_distance = torch.stack(losses).view(-1, 3).mean(0)
    wanted = by_distance @ torch.tensor([4.0, 2.0, 1.0]) / 7
    close(objective.loss(model, inputs), wanted, "loss")
    changed = torch.cat([(ids[:, :5] + 1) % 40, ids[:, 5:]], dim=1)
    logits = model.logits(states[:, 9], ids[:, 10:12])
    other = model.logits(model.read(changed)[0][:, 9], ids[:, 10:12])
    assert not torch.allclose(
        logits, other, atol=1e-3
    )  # what the text was matters, through the state


@torch.no_grad()
def test_every_way_to_decode_reads_it():
    reader, ids = FutureTokenReader(build()), draw(1, 9)
    whole = reader.read(ids, keep=0)
    first = reader.read(ids[:, :4], keep=0)
    rest = reader.read(ids[:, 4:], first.state, keep=0)
    close(torch.cat([first.logits, rest.logits], dim=1), whole.logits, "read in two parts")
    (text,) = GREEDY.run(reader, ids, new_tokens=5)
    written = torch.cat([ids, torch.tensor([text.ids])], dim=1)
    assert reader.read(written, keep=6).logits[0, :-1].argmax(-1).tolist() == text.ids
    (beam,) = Beams(width=1).run(reader, ids, new_tokens=5)
    assert beam.ids == text.ids


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="reads the future"):
        build("bidirectional_attention")
    with pytest.raises(RangeError, match="pseudo=0"):
        build(pseudo=0)
    kind = OBJECTIVES.get("future_tokens")
    with pytest.raises(ConfigError, match="ahead=0"):
        kind.Config(ahead=0)
