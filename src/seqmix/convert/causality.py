"""One set of weights read in one direction, in both, or in both over a prefix.

    causal   y_t sees x_1 ... x_t              both   y_t sees x_1 ... x_T
    prefix   y_t sees x_1 ... x_max(P, t)      P tokens of prompt

The three attention mixers have the same weights, so changing the direction changes none; the model then needs some
training to make use of it, or to do without. Adaptation of decoders to prefixes and back: Wang et al. 2022
(arXiv:2204.05832), section 5; of decoders to encoders and back: Weller et al. 2025 (arXiv:2507.11412), section 5.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from seqmix.core.errors import ConfigError
from seqmix.models.encoder import SeqmixForMaskedLM
from seqmix.models.hf import SeqmixConfig, SeqmixForCausalLM, SeqmixModel

Direction = Literal["causal", "prefix", "both"]
MIXERS = {
    "causal": "attention",
    "prefix": "prefix_attention",
    "both": "bidirectional_attention",
}


def redirect(model: SeqmixModel, direction: Direction) -> SeqmixForCausalLM | SeqmixForMaskedLM:
    """A copy of `model` with the same weights whose attention looks in this direction.

    `causal` and `prefix` give a `SeqmixForCausalLM`, `both` a `SeqmixForMaskedLM`. Options of the mixers, such as
    windows, stay. Raises `ConfigError` for a mixer that has only one direction, such as a recurrence.
    """
    if direction not in MIXERS:
        raise ConfigError(f"direction={direction!r}, wanted one of {', '.join(MIXERS)}.")
    spec = model.config.to_spec()
    entries = []
    for entry in spec.entries():
        if entry.mixer.name not in (*MIXERS.values(), "none"):
            raise ConfigError(
                f"redirect: {entry.mixer.name} has one direction only. It works for layouts of "
                f"{', '.join(MIXERS.values())}."
            )
        name = "none" if entry.mixer.name == "none" else MIXERS[direction]
        mixer = dataclasses.replace(entry.mixer, name=name)
        entries.append(dataclasses.replace(entry, mixer=mixer))
    spec = spec.with_entries(entries)
    ids = {name: value for name, value in vars(model.config).items() if name.endswith("_token_id")}
    kind = SeqmixForMaskedLM if direction == "both" else SeqmixForCausalLM
    made = kind(SeqmixConfig.from_spec(spec, **ids)).to(model.device, model.dtype)
    made.model.load_state_dict(model.model.state_dict())
    return made.train(model.training)
