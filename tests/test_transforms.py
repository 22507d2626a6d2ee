"""Every transform keeps every law, on every small model that it takes; broken ones do not."""

from dataclasses import dataclass

import pytest
import torch

from seqmix.compress import TRANSFORMS, Needs, Transform
from seqmix.models.rebuild import rebuild
from seqmix.testing import check_transform
from seqmix.testing.transforms import LAWS, MODELS, Subject, refuses

SUBJECTS = [Subject(TRANSFORMS.get(name), model) for name in TRANSFORMS for model in MODELS]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: f"{s.transform().name}-{s.model}")
def test_transform(subject):
    if reason := refuses(subject):
        pytest.skip(f"refused: {reason}")
    for law in LAWS:
        law(subject)


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_every_transform_takes_some_model(name):
    assert any(refuses(subject) is None for subject in SUBJECTS if subject.transform().name == name)


@dataclass(frozen=True, kw_only=True)
class Sound(Transform):
    """Makes a copy of the model: no use, and no harm."""

    share: float = 0.5

    def fit(self, model, data, work):
        return rebuild(model, model.config.to_spec(), model.state_dict())

    def needs(self, model, data):
        return Needs()

    @property
    def name(self):
        return "int8"  # so that recipes know it


class InPlace(Sound):
    def fit(self, model, data, work):
        with torch.no_grad():
            model.model.head.weight.mul_(0.9)
        return model


class Shared(Sound):
    def fit(self, model, data, work):
        made = super().fit(model, data, work)
        made.model.backbone.norm.weight = model.model.backbone.norm.weight
        return made


class Unsaved(Sound):
    def fit(self, model, data, work):
        made = super().fit(model, data, work)
        made.model.head.register_forward_hook(lambda module, given, out: out + 0.1)
        return made


class Random(Sound):
    def fit(self, model, data, work):
        made = super().fit(model, data, work)
        seed = torch.seed()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight = made.model.backbone.norm.weight
            weight += torch.randn(weight.shape, generator=generator)
        return made


class Unready(Sound):
    def needs(self, model, data):
        return Needs(forward_tokens=-1)


class Untold(Sound):
    def fit(self, model, data, work):
        work.notes["layers"] = {torch.ones(1)}
        return super().fit(model, data, work)


BROKEN = {
    InPlace: "the_original_stays_as_it_was",
    Shared: "the_original_stays_as_it_was",
    Unsaved: "saving_and_loading_changes_nothing",
    Random: "the_same_again_gives_the_same",
    Unready: "it_says_what_it_needs",
    Untold: "notes_are_plain",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_broken_transforms_fail(kind):
    law = next(law for law in LAWS if law.__name__ == BROKEN[kind])
    law(Subject(Sound, "attention"))
    with pytest.raises((AssertionError, TypeError)):
        law(Subject(kind, "attention"))


def test_a_transform_that_takes_nothing_is_told():
    from seqmix.core.errors import ConfigError

    class Refusing(Sound):
        def fit(self, model, data, work):
            raise ConfigError("no")

    with pytest.raises(AssertionError, match="takes none"):
        check_transform(Refusing)
