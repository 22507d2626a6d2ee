"""Guesses change how fast a text comes, never what it is: tokens or their distribution are those of plain decoding."""

from __future__ import annotations

import pytest
import torch
import transformers

from seqmix.core.errors import ConfigError, RangeError
from seqmix.generate import DraftModel, PromptLookup, Sampling, Speculative
from seqmix.generate._method import Constraint
from seqmix.generate._reader import Reader, Reading
from seqmix.generate.sampling import GREEDY
from seqmix.generate.speculative import UNREAD
from seqmix.testing.models import build, draw, layouts


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def perturbed(model_layout, share):
    """A drafter that often agrees with the model: the same one with noise on its weights."""
    other = build(model_layout)
    torch.manual_seed(5)
    for parameter in other.parameters():
        parameter.add_(share * parameter.std() * torch.randn_like(parameter))
    return other


class Table(Reader):
    """A model whose logits depend on the last token alone."""

    def __init__(self, logits):
        self.logits = logits

    def read(self, ids, state=None, *, keep=1):
        logits = self.logits[ids % len(self.logits)]
        return Reading(logits[:, -keep:], logits, None)

    def select(self, state, rows):
        return None


def texts(model, method, *, length=18, prompt=None, **task):
    prompt = draw(1, 5) if prompt is None else prompt
    return method.run(model, prompt, new_tokens=length, **task)


@pytest.mark.parametrize("layout", layouts())
def test_greedy_text_is_the_same_for_every_mixer(layout):
    model = build(layout)
    (wanted,) = texts(model, GREEDY)
    ways = [(perturbed(layout, 0.1), 3), (perturbed(layout, 0.02), UNREAD + 2)]
    for drafter, guesses in ways if "," in layout else ways[:1]:
        (got,) = texts(model, Speculative(drafter=DraftModel(drafter), guesses=guesses))
        assert got.ids == wanted.ids
        assert got.log_probability == pytest.approx(wanted.log_probability, abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_greedy_text_is_the_same_for_models_of_transformers(kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
    if kind == "llama":
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.mul_(2)
    (wanted,) = texts(model, GREEDY)
    for drafter in (DraftModel(build("2x[attention]")), PromptLookup(2)):
        (got,) = texts(model, Speculative(drafter=drafter))
        assert got.ids == wanted.ids


def test_a_perfect_drafter_saves_checks():
    layout = "mamba2, attention"
    model = build(layout)
    (got,) = texts(model, Speculative(drafter=DraftModel(model), guesses=4), length=25)
    assert got.checks == 5
    circle = Table(100 * torch.eye(5).roll(1, dims=1))
    method, options = Speculative(drafter=PromptLookup()), {"prompt": draw(1, 2) % 5, "length": 40}
    (found,) = texts(circle, method, **options)
    assert found.ids == texts(circle, GREEDY, **options)[0].ids
    assert found.checks <= 5 + 40 / 5  # once around, then five tokens at a time


def test_a_drafter_reads_its_model_as_it_is_for_every_text():
    model = build("2x[attention]")
    drafter = DraftModel(model)
    for _ in range(2):
        (got,) = texts(model, Speculative(drafter=drafter, guesses=4), length=25)
        assert got.checks == 5
        for block in model.model.backbone.blocks:
            block.mixer.value.weight = torch.nn.Parameter(block.mixer.value.weight.flip(0))


def test_a_text_ends_where_the_plain_one_does():
    layout = "gated_linear_attention, attention"
    model = build(layout)
    (plain,) = texts(model, GREEDY)
    seen = []
    for ends in ({plain.ids[6]}, {plain.ids[9], plain.ids[3]}):
        (wanted,) = texts(model, GREEDY, ends=frozenset(ends))
        drafter = DraftModel(perturbed(layout, 0.05))
        (got,) = texts(model, Speculative(drafter=drafter), ends=frozenset(ends), emit=seen.append)
        assert (got.ids, got.is_ended) == (wanted.ids, True)
        assert seen == got.ids
        seen.clear()
    for length in range(1, 8):
        (got,) = texts(model, Speculative(drafter=DraftModel(model)), length=length)
        assert got.ids == plain.ids[:length]


class Even(Constraint):
    """Texts of even tokens."""

    def allowed(self, ids, vocabulary, ends):
        assert all(token % 2 == 0 for token in ids)
        return torch.arange(vocabulary) % 2 == 0

    def is_over(self, ids):
        return False


def test_a_constraint_holds_for_guesses():
    model = build("2x[rwkv7]")
    (wanted,) = texts(model, GREEDY, constraint=Even())
    for drafter in (DraftModel(build("attention")), PromptLookup(1)):
        (got,) = texts(model, Speculative(drafter=drafter), constraint=Even())
        assert got.ids == wanted.ids


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_k=4, repetition_penalty=1.5, presence_penalty=0.3)],
)
@pytest.mark.parametrize("drafter", ["model", "lookup"])
def test_sampled_texts_have_the_distribution_of_plain_ones(sampling, drafter):
    """All texts of three tokens of five: counts against exact probabilities, by chi-square."""
    torch.manual_seed(0)
    tables = torch.randn(2, 5, 5)
    model = Table(tables[0])
    made = DraftModel(Table(tables.mean(0))) if drafter == "model" else PromptLookup(1)
    prompt = torch.tensor([[1, 2, 1, 2]])
    expected = {(): 1.0}
    for _ in range(3):
        longer = {}
        for ids, chance in expected.items():
            logits = tables[0, [(2, *ids)[-1]]]
            chances = sampling.probabilities(logits, prompt[0].tolist(), [list(ids)])
            longer |= {(*ids, v): chance * float(chances[0, v]) for v in range(5)}
        expected = longer
    method = Speculative(drafter=made, guesses=2, sampling=sampling)
    count = 600
    counts = dict.fromkeys(expected, 0)
    for text in texts(model, method, length=3, prompt=prompt, texts=count):
        counts[tuple(text.ids)] += 1
    assert all(counts[ids] == 0 for ids, chance in expected.items() if chance == 0)
    likely = [ids for ids, chance in expected.items() if chance * count >= 5]
    rest = count * (1 - sum(expected[ids] for ids in likely))
    cells = [(counts[ids], count * expected[ids]) for ids in likely]
    if rest > 1e-3:
        cells.append((count - sum(counts[ids] for ids in likely), rest))
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert freedom >= 8
    assert chi_square < freedom + 3.3 * (2 * freedom) ** 0.5 + 4  # about p = 0.001


def test_what_does_not_fit_is_refused():
    model = build("attention")
    other = DraftModel(build("attention", vocabulary=50))
    with pytest.raises(ConfigError, match="50 tokens and the model 40"):
        texts(model, Speculative(drafter=other))
    with pytest.raises(RangeError, match="guesses=0"):
        Speculative(drafter=other, guesses=0)
    with pytest.raises(RangeError, match="longest=0"):
        PromptLookup(0)
