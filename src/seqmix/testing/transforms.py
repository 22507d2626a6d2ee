"""Laws of transforms: each takes a `Subject` and raises AssertionError where it does not hold.

`check_transform(TRANSFORM)` holds a transform to all of them on small models of every kind. A model that the transform
refuses, with a `ConfigError` that says why, keeps every law; one at least must be taken.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqmix.compress import Calibration, Transform, Work, parse_recipe, write_recipe
from seqmix.core import extras
from seqmix.core.errors import ConfigError
from seqmix.core.numerics import assert_equal_within
from seqmix.data.text import Corpus
from seqmix.data.tokenizer import byte_tokenizer, save_tokenizer
from seqmix.layers.progressive_norm import switch_over
from seqmix.measure.footprint import stored_bytes
from seqmix.models.hf import SeqmixForCausalLM, create

MODELS: dict[str, dict[str, Any]] = {  # name -> layout and fields
    "attention": {"layout": "3x[attention]"},
    "biases": {
        "layout": "2x[attention(bias=true)/mlp(bias=true)]",
        "norm": "layer",
        "positions": 64,
    },
    "grouped": {"layout": "3x[attention(heads=4, key_heads=2)]", "tied": False},
    "state_space": {"layout": "3x[mamba2]"},
    "hybrid": {"layout": "mamba, gated_linear_attention, attention"},
    "experts": {"layout": "2x[attention/mixture_of_experts]"},
    "progressive": {"layout": "2x[attention]", "norm": "progressive_batch"},
}
TEXT = "".join(f"{n} sheep and {n + 1} goats went over the hill.\n" for n in range(120))
LENGTH, WINDOWS = 32, 6


@dataclass(frozen=True)
class Subject:
    """A transform, in its quick options, and a small model."""

    kind: type[Transform]
    model: str

    def build(self) -> SeqmixForCausalLM:
        """The same random model every time, whose logits are spread."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fields = {"width": 32, "heads": 4, "eos_token_id": 256, **MODELS[self.model]}
            model = create(fields.pop("layout"), **fields)
        switch_over(model, 0)
        return model.eval()

    def transform(self) -> Transform:
        return self.kind.from_dict(self.kind.quick)

    def fit(self, model: SeqmixForCausalLM, work: Work | None = None) -> SeqmixForCausalLM:
        """The cheaper model; raises `ConfigError` where it is refused."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(1)
            return self.transform().fit(model, calibration(), work or Work()).eval()


Law = Callable[[Subject], None]


@lru_cache(maxsize=4)
def fitted(subject: Subject) -> tuple[SeqmixForCausalLM, Work]:
    """What the laws look at that change nothing, made once."""
    work = Work()
    return subject.fit(subject.build(), work), work


@lru_cache
def calibration() -> Calibration:
    """Windows of a small text with its tokeniser."""
    corpus = Corpus("sheep", (TEXT,))
    transformers = extras.require("transformers", extra="train")
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(byte_tokenizer(), folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Calibration.of(corpus, tokenizer, length=LENGTH, windows=WINDOWS)


def ids(rows: int = 2, length: int = 11) -> Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(3))


def the_original_stays_as_it_was(subject: Subject) -> None:
    model = subject.build()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    try:
        made = subject.fit(model)
    except ConfigError:
        made = None
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]), f"{name} of the original has changed"
    assert model.config.to_dict() == config, "the configuration of the original has changed"
    if made is not None:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.fill_(0.5) if parameter.is_floating_point() else None
        shared = [n for n, t in model.state_dict().items() if not t.equal(before[n])]
        assert not shared, f"{shared[0]} shares memory with the new model"


@torch.no_grad()
def saving_and_loading_changes_nothing(subject: Subject) -> None:
    made, _ = fitted(subject)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        assert {p.suffix for p in Path(folder).iterdir()} == {".json", ".safetensors"}
        loaded = SeqmixForCausalLM.from_pretrained(folder).eval()
    for name, tensor in made.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), (
            f"{name} was saved or loaded as something else"
        )
    # Products of a few rows may round by where in memory a weight begins, so not to the last bit.
    got, wanted = loaded(ids()).logits, made(ids()).logits
    assert_equal_within(got, wanted, what="the loaded model", tolerance=1e-6)


@torch.no_grad()
def reading_in_pieces_changes_nothing(subject: Subject) -> None:
    (made, _), given = fitted(subject), ids()
    whole = made(given).logits
    first = made(given[:, :4], use_cache=True)
    rest = made(given[:, 4:], past_key_values=first.past_key_values).logits
    got = torch.cat([first.logits, rest], dim=1)
    # Kernels for few tokens and for many may round at different places.
    assert_equal_within(got, whole, what="in two pieces", tolerance=2e-3)


@torch.no_grad()
def pads_change_nothing(subject: Subject) -> None:
    (made, _), given = fitted(subject), ids()
    mask = torch.ones_like(given)
    mask[0, :3] = 0
    padded = made(given, attention_mask=mask).logits[0, 3:]
    assert_equal_within(padded, made(given[:1, 3:]).logits[0], what="pads", tolerance=2e-3)


@torch.no_grad()
def the_same_again_gives_the_same(subject: Subject) -> None:
    """Twice from nothing, and once more from what a stopped run had remembered."""
    model, (first, _) = subject.build(), fitted(subject)
    with tempfile.TemporaryDirectory() as folder:
        for what in ("again", "from memory"):
            other = subject.fit(model, Work(folder=Path(folder)))
            assert other(ids()).logits.equal(first(ids()).logits), f"{what}: other logits"


def it_takes_no_more_room(subject: Subject) -> None:
    """As little as this asks, it catches a transform that leaves what it pruned in the tensors."""
    before, after = (stored_bytes(m.model) for m in (subject.build(), fitted(subject)[0]))
    assert after <= before or subject.kind.grows, f"{before} bytes became {after}"


def it_says_what_it_needs(subject: Subject) -> None:
    needs = subject.transform().needs(subject.build(), calibration())
    assert min(needs.forward_tokens, needs.training_tokens, needs.memory_mb) >= 0


def notes_are_plain(subject: Subject) -> None:
    json.dumps(fitted(subject)[1].notes, allow_nan=False)


@torch.no_grad()
def it_combines_with_others(subject: Subject) -> None:
    """After and before others it works, or says why not."""
    others = parse_recipe("finercut:0.3 | int8")
    model = subject.build()
    for before in ([], others[:1], others[1:]):
        for after in ([], others[1:]):
            made = model
            try:
                for step in [*before, subject.transform(), *after]:
                    with torch.enable_grad():
                        made = step.fit(made, calibration(), Work()).eval()
            except ConfigError:
                continue
            assert made(ids()).logits.isfinite().all(), f"after {before}, before {after}"


def recipes_round_trip(subject: Subject) -> None:
    transform = subject.transform()
    assert parse_recipe(write_recipe([transform])) == [transform]


LAWS: tuple[Law, ...] = (
    the_original_stays_as_it_was,
    saving_and_loading_changes_nothing,
    reading_in_pieces_changes_nothing,
    pads_change_nothing,
    the_same_again_gives_the_same,
    it_takes_no_more_room,
    it_says_what_it_needs,
    notes_are_plain,
    it_combines_with_others,
    recipes_round_trip,
)


def refuses(subject: Subject) -> str | None:
    """Why the transform does not take this model, or None."""
    try:
        fitted(subject)
    except ConfigError as error:
        return str(error)
    return None


def check_transform(kind: type[Any]) -> None:
    """Holds a transform to every law on every small model that it takes; raises at the first that is broken."""
    taken = [s for s in (Subject(kind, model) for model in MODELS) if refuses(s) is None]
    assert taken, f"{kind.__name__} takes none of the models {', '.join(MODELS)}"
    for subject in taken:
        for law in LAWS:
            law(subject)
