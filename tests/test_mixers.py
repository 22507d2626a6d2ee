"""Every mixer and every channel mixer, held to every law; and broken ones, which must fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from seqmix.channels import CHANNELS
from seqmix.core.errors import SeqmixError
from seqmix.core.state import Growing, State, map_state
from seqmix.mixers import MIXERS
from seqmix.mixers.gated_linear_attention import Config, GatedLinearAttention
from seqmix.testing import mixers as laws
from seqmix.testing._subject import Law, cases, exception, subjects
from seqmix.testing.channels import CHANNEL_LAWS, check_channel
from seqmix.testing.mixers import MIXER_LAWS, check_mixer


def product(catalog: Any, laws: Sequence[Law]) -> list[Any]:
    """law x entry x example; what a class declares as an exception must fail."""
    found = []
    for name in catalog:
        for law, subject in cases(catalog.get(name), laws):
            reason = exception(subject, law)
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            label = f"{law.__name__}-{name}-{subject.name}"
            found.append(pytest.param(law, subject, id=label, marks=marks))
    return found


@pytest.mark.parametrize(("law", "subject"), product(MIXERS, MIXER_LAWS))
def test_mixer(law: Law, subject: Any) -> None:
    law(subject)


@pytest.mark.parametrize(("law", "subject"), product(CHANNELS, CHANNEL_LAWS))
def test_channel(law: Law, subject: Any) -> None:
    law(subject)


@pytest.mark.parametrize("bounds", [[0, 3], [0, 7, 5], [1, 5], [5]], ids=str)
@pytest.mark.parametrize("name", [name for name in MIXERS if MIXERS.get(name).causal])
def test_boundaries_that_do_not_fit_are_refused(name: str, bounds: list[int]) -> None:
    subject, *_ = subjects(MIXERS.get(name))
    with pytest.raises(SeqmixError, match="cu_seqlens"):
        subject.build()(subject.tokens(5, batch=1), cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("catalog", [MIXERS, CHANNELS], ids=["mixers", "channels"])
def test_exceptions_name_laws(catalog: Any) -> None:
    known = {law.__name__ for law in [*MIXER_LAWS, *CHANNEL_LAWS]}
    for name in catalog:
        for law, reason in catalog.get(name).exceptions.items():
            assert law.partition("[")[0] in known, f"{name}: {law} is not a law"
            assert reason.strip(), f"{name}: the exception from {law} has no reason"


class Sound(GatedLinearAttention):
    """A mixer with one thing broken in each subclass."""


class LooksAhead(Sound):
    def forward(self, x: Tensor, state: State = None, **options: Any) -> tuple[Tensor, State]:
        y, state = super().forward(x, state, **options)
        return y + 0.01 * x.roll(-1, dims=1), state


class ForgetsItsState(Sound):
    def forward(self, x: Tensor, state: State = None, **options: Any) -> tuple[Tensor, State]:
        return super().forward(x, map_state(torch.zeros_like, state), **options)


class DetachesItsState(Sound):
    def forward(self, x: Tensor, state: State = None, **options: Any) -> tuple[Tensor, State]:
        return super().forward(x, map_state(torch.detach, state), **options)


class WritesIntoItsState(Sound):
    def forward(self, x: Tensor, state: State = None, **options: Any) -> tuple[Tensor, State]:
        y, after = super().forward(x, state, **options)
        if state is not None:
            with torch.no_grad():
                state["recurrent"].data.copy_(after["recurrent"])
        return y, after


class IgnoresBoundaries(Sound):
    def forward(
        self, x: Tensor, state: State = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        if cu_seqlens is None:
            return super().forward(x, state)
        count = len(cu_seqlens) - 1
        y, after = super().forward(x, None)
        return y, map_state(lambda leaf: leaf.repeat(count, 1, 1, 1), after)


class ReadsATreeAsOneText(Sound):
    def read_tree(self, x: Tensor, state: State, tree: Any) -> tuple[Tensor, State]:
        y, _ = self(x, state)
        return y, self(x[:, : -len(tree)], state)[1]


class ForgetsWhatIsBeforeATree(Sound):
    def read_tree(self, x: Tensor, state: State, tree: Any) -> tuple[Tensor, State]:
        return super().read_tree(x, map_state(torch.zeros_like, state), tree)


class MistakesAnInnerNode(Sound):
    def read_tree(self, x: Tensor, state: State, tree: Any) -> tuple[Tensor, State]:
        y, state = super().read_tree(x, state, tree)
        first = x.shape[1] - len(tree)
        return torch.cat(
            [y[:, :first], 1.01 * y[:, first : first + 1], y[:, first + 1 :]], 1
        ), state


class LosesTheStateOfASecondCall(Sound):
    def forward(self, x: Tensor, state: State = None, **options: Any) -> tuple[Tensor, State]:
        y, after = super().forward(x, state, **options)
        return y, after if state is None else map_state(torch.zeros_like, after)


class StepsWithoutGate(Sound):
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = super().step(x, state)
        return 1.01 * y, state


class MixesRows(Sound):
    def forward(self, x: Tensor, state: State = None, **options: Any) -> tuple[Tensor, State]:
        y, state = super().forward(x, state, **options)
        return y + 1e-3 * x.mean(dim=0, keepdim=True), state


class HasAnIdleParameter(Sound):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.idle = nn.Parameter(torch.ones(3))


@dataclass(frozen=True, kw_only=True)
class IdleConfig(Config):
    idle: float = 1.0


class HasAnIdleField(Sound):
    Config = IdleConfig


class ExplodesAtFirst(Sound):
    def forward(self, x: Tensor, state: State = None, **options: Any) -> tuple[Tensor, State]:
        y, state = super().forward(x, state, **options)
        return 100 * y, state


class MiscountsItsState(Sound):
    def state_bytes(self, length: int) -> int:
        return super().state_bytes(length) // 2


class KeepsItsTextInMemory(Sound):
    def forward(self, x: Tensor, state: State = None, **options: Any) -> tuple[Tensor, State]:
        y, after = super().forward(x, state, **options)
        return y, {**after, "unused": x.repeat(1, 2, 1)[:, :1]}


class KeepsWeightsOutOfTheStateDict(Sound):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("gain", torch.rand(config.width), persistent=False)

    def forward(self, x: Tensor, state: State = None, **options: Any) -> tuple[Tensor, State]:
        y, state = super().forward(x, state, **options)
        return y * self.gain, state


class KeepsItsStateInHalfPrecision(Sound):
    def forward(self, x: Tensor, state: State = None, **options: Any) -> tuple[Tensor, State]:
        y, state = super().forward(x, state, **options)
        return y, map_state(torch.Tensor.bfloat16, state)


MUTANTS = [
    (LooksAhead, laws.the_future_changes_nothing),
    (LooksAhead, laws.the_future_gets_no_gradient),
    (ForgetsItsState, laws.splitting_anywhere_changes_nothing),
    (DetachesItsState, laws.gradients_flow_through_the_state),
    (WritesIntoItsState, laws.a_state_is_a_value),
    (IgnoresBoundaries, laws.packed_texts_equal_separate_calls),
    (IgnoresBoundaries, laws.packed_texts_give_the_same_gradients),
    (IgnoresBoundaries, laws.nothing_leaks_between_packed_texts),
    (IgnoresBoundaries, laws.texts_of_different_lengths_continue_together),
    (ReadsATreeAsOneText, laws.a_tree_is_read_as_its_paths),
    (ForgetsWhatIsBeforeATree, laws.a_tree_is_read_as_its_paths),
    (MistakesAnInnerNode, laws.a_tree_is_read_as_its_paths),
    (LosesTheStateOfASecondCall, laws.splitting_anywhere_changes_nothing),
    (LosesTheStateOfASecondCall, laws.step_equals_forward),
    (StepsWithoutGate, laws.step_equals_forward),
    (MixesRows, laws.rows_are_independent),
    (HasAnIdleParameter, laws.every_parameter_gets_a_gradient),
    (HasAnIdleField, laws.every_field_has_an_effect),
    (ExplodesAtFirst, laws.output_scale_is_moderate),
    (MiscountsItsState, laws.state_bytes_are_as_declared),
    (KeepsItsTextInMemory, laws.a_state_keeps_nothing_else_in_memory),
    (KeepsWeightsOutOfTheStateDict, laws.configuration_and_weights_round_trip),
    (KeepsWeightsOutOfTheStateDict, laws.builds_on_the_meta_device),
    (KeepsItsStateInHalfPrecision, laws.splitting_anywhere_changes_nothing),
]


@pytest.mark.parametrize(
    ("mutant", "law"), MUTANTS, ids=[f"{mutant.__name__}-{law.__name__}" for mutant, law in MUTANTS]
)
def test_broken_mixers_fail_the_law_that_they_break(mutant: Any, law: Law) -> None:
    (subject,) = subjects(mutant)
    with pytest.raises(AssertionError):
        law(subject)


def test_a_cache_that_forks_write_into_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    append = Growing.append

    def append_in_place(self: Growing, new: Tensor) -> Growing:
        self._stamp = self._storage.stamp
        return append(self, new)

    monkeypatch.setattr(Growing, "append", append_in_place)
    subject, *_ = subjects(MIXERS.get("attention"))
    with pytest.raises(AssertionError):
        laws.a_state_is_a_value(subject)


def test_check_mixer_names_the_mixer_and_the_law() -> None:
    with pytest.raises(AssertionError, match=r"LooksAhead.*breaks the_future_changes_nothing"):
        check_mixer(LooksAhead)


def test_an_exception_that_is_not_needed_is_an_error() -> None:
    class Modest(Sound):
        exceptions: ClassVar = {"step_equals_forward": "nothing is wrong with it"}

    with pytest.raises(AssertionError, match="keeps step_equals_forward"):
        check_mixer(Modest)


def test_check_channel_accepts_a_sound_channel() -> None:
    check_channel(CHANNELS.get("glu"))
