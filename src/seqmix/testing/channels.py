"""Laws of channel mixers: each takes a `Subject` and raises AssertionError where it does not hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqmix.channels import Channel
from seqmix.testing import _subject
from seqmix.testing._subject import Law, Subject, assert_close, check, of_the_class


def output_has_the_shape_of_the_input(subject: Subject) -> None:
    for length in (1, 23):
        x = subject.tokens(length)
        assert subject.build()(x).shape == x.shape


def every_token_is_on_its_own(subject: Subject) -> None:
    channel, x = subject.build(dtype=torch.float64), subject.tokens(dtype=torch.float64)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
    assert_close(channel(x[:, order]), channel(x)[:, order], "permuted tokens", 1e-12)
    assert_close(channel(x[:1, 3:4]), channel(x)[:1, 3:4], "one token alone", 1e-12)


def tokens_get_no_gradient_from_each_other(subject: Subject) -> None:
    channel, x = subject.build(), subject.tokens().requires_grad_()
    (gradient,) = torch.autograd.grad(channel(x)[0, 5].square().sum(), x)
    others = gradient.clone()
    others[0, 5] = 0
    assert gradient[0, 5].any()
    assert not others.any(), "a token's output depends on other tokens"


def every_parameter_gets_a_gradient(subject: Subject) -> None:
    channel, x = subject.build(), subject.tokens(200)
    _subject.assert_every_parameter_gets_a_gradient(channel, lambda: channel(x))


@of_the_class
def every_field_has_an_effect(subject: Subject) -> None:
    for field in subject.kind.Config.fields():
        _subject.assert_field_has_an_effect(
            subject, field, lambda channel: _output(subject, channel)
        )


def output_scale_is_moderate(subject: Subject) -> None:
    _subject.assert_moderate_scale(subject.build()(subject.tokens(300)))


def cost_is_positive_and_grows(subject: Subject) -> None:
    short, long = subject.build().cost(64), subject.build().cost(128)
    assert 0 < short.flops < long.flops
    assert 0 < short.bytes < long.bytes


def configuration_and_weights_round_trip(subject: Subject) -> None:
    _subject.assert_round_trip(subject, lambda channel: _output(subject, channel))


def builds_on_the_meta_device(subject: Subject) -> None:
    _subject.assert_builds_on_meta(subject, lambda channel: _output(subject, channel))


def a_deep_copy_is_independent(subject: Subject) -> None:
    _subject.assert_deep_copy_is_independent(subject, lambda channel: _output(subject, channel))


def bfloat16_stays_within_budget(subject: Subject) -> None:
    _subject.assert_bfloat16_is_near(
        subject, lambda channel, dtype: channel(subject.tokens().bfloat16().to(dtype))
    )


def mixed_precision_stays_within_budget(subject: Subject) -> None:
    _subject.assert_mixed_precision_is_near(subject, lambda channel: _output(subject, channel))


def repeated_runs_are_equal(subject: Subject) -> None:
    assert _output(subject, subject.build()).equal(_output(subject, subject.build()))


def _output(subject: Subject, channel: nn.Module) -> Tensor:
    return channel(subject.tokens())


CHANNEL_LAWS: tuple[Law, ...] = (
    output_has_the_shape_of_the_input,
    every_token_is_on_its_own,
    tokens_get_no_gradient_from_each_other,
    every_parameter_gets_a_gradient,
    every_field_has_an_effect,
    output_scale_is_moderate,
    cost_is_positive_and_grows,
    configuration_and_weights_round_trip,
    builds_on_the_meta_device,
    a_deep_copy_is_independent,
    bfloat16_stays_within_budget,
    mixed_precision_stays_within_budget,
    repeated_runs_are_equal,
)


def check_channel(channel_class: type[Channel]) -> None:
    """Holds a channel mixer, in its default configuration and its `examples`, to every law.

    Raises AssertionError at the first law that it breaks without saying so in `exceptions`.
    """
    check(channel_class, CHANNEL_LAWS)
