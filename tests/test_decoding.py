"""Ways to decode: each gives what it would give if every step read the whole text again."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import transformers

from seqmix.core.errors import ConfigError, DataError, RangeError, ShapeError
from seqmix.generate import Beams, Contrastive, DiverseBeams, Sampling
from seqmix.generate._method import Constraint, Task
from seqmix.generate._reader import Reader, Reading, reader_of
from seqmix.generate.diverse_beams import ngrams
from seqmix.generate.sampling import GREEDY, draw, random_numbers
from seqmix.testing.models import build
from seqmix.testing.models import draw as draw_ids

LAYOUTS = (
    "2x[attention]",
    "2x[windowed_attention(window=4)]",
    "2x[mamba2]",
    "2x[gated_delta_net]",
    "2x[rwkv7]",
    "2x[short_convolution]",
    "gated_linear_attention, attention",
    "mamba, windowed_attention(window=3)/none",
)
METHODS = {
    "greedy": GREEDY,
    "sampling": Sampling(temperature=1.5, top_k=20, top_p=0.95, min_p=0.01),
    "penalties": Sampling(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
    "beams": Beams(width=3),
    "diverse_beams": DiverseBeams(groups=3, width=2, strength=1.0),
    "ngrams": DiverseBeams(groups=2, width=2, strength=2.0, agreement=ngrams(2)),
    "contrastive": Contrastive(candidates=3, weight=0.6),
}
ENDS = frozenset([3, 7, 11])


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


class Rereader(Reader):
    """Reads the whole text every time; its state is the text."""

    def __init__(self, model):
        self.model = model

    def read(self, ids, state=None, *, keep=1):
        state = ids if state is None else torch.cat([state, ids], dim=1)
        new = state.shape[1] if keep == 0 else keep
        model = self.model.model
        features, _ = model.backbone(model.embedding(state))
        return Reading(model.logits(features)[:, -new:], features[:, -ids.shape[1] :], state)

    def select(self, state, rows):
        return state[rows]


def decoded(reader, method, *, texts=1, ends=ENDS, **task):
    with torch.inference_mode():
        asked = Task(
            prompt=draw_ids(1, 5),
            new_tokens=task.pop("new_tokens", 8),
            texts=texts,
            ends=ends,
            **task,
        )
        return method.decode(reader, asked)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_a_state_gives_what_reading_everything_again_gives(layout, name):
    model = build(layout)
    texts = 1 if name == "contrastive" else 3
    got = decoded(reader_of(model), METHODS[name], texts=texts)
    wanted = decoded(Rereader(model), METHODS[name], texts=texts)
    assert [text.ids for text in got] == [text.ids for text in wanted]
    for text in got:
        ids = torch.tensor([draw_ids(1, 5)[0].tolist() + text.ids])
        logs = model(ids).logits.log_softmax(-1)[0, 4:-1]
        likelihood = float(logs.gather(1, ids[0, 5:, None]).sum())
        assert text.log_probability == pytest.approx(likelihood, abs=1e-3)
        assert text.is_ended == (text.ids[-1] in ENDS)
        assert text.is_ended or len(text.ids) == 8


@pytest.mark.parametrize("kind", ["llama", "mamba", "gemma3_text"])
@pytest.mark.parametrize("name", ["sampling", "beams", "contrastive"])
def test_models_of_transformers_decode_alike(kind, name):
    """Their caches are changed by reading, so what was read before must have been kept."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    window = {"sliding_window": 4, "head_dim": 8} if kind == "gemma3_text" else {}
    config = transformers.AutoConfig.for_model(
        kind, **sizes, **(heads if kind != "mamba" else {}), **window
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)

    class Foreign(Rereader):
        def read(self, ids, state=None, *, keep=1):
            state = ids if state is None else torch.cat([state, ids], dim=1)
            new = state.shape[1] if keep == 0 else keep
            output = model(input_ids=state, output_hidden_states=True, use_cache=False)
            features = output.hidden_states[-1][:, -ids.shape[1] :]
            return Reading(output.logits[:, -new:], features, state)

    texts = 1 if name == "contrastive" else 3
    got = decoded(reader_of(model), METHODS[name], texts=texts)
    wanted = decoded(Foreign(model), METHODS[name], texts=texts)
    assert [text.ids for text in got] == [text.ids for text in wanted]


class TestSampling:
    def test_a_text_is_the_same_alone_and_among_others(self):
        reader = reader_of(build(LAYOUTS[-2]))
        options = {"new_tokens": 12}
        together = decoded(reader, Sampling(), texts=4, seed=5, **options)
        assert len({tuple(text.ids) for text in together}) > 1
        for place, text in enumerate(together):
            (alone,) = decoded(reader, Sampling(), seed=5 + place, **options)
            assert alone.ids == text.ids

    def test_the_distribution_is_that_of_transformers(self):
        torch.manual_seed(2)
        logits, prompt, written = 3 * torch.randn(2, 40), [1, 2, 3], [[4, 5, 4], [6, 1, 1]]
        warpers = transformers.LogitsProcessorList(
            [
                transformers.RepetitionPenaltyLogitsProcessor(1.3),
                transformers.TemperatureLogitsWarper(1.7),
                transformers.TopKLogitsWarper(25),
                transformers.TopPLogitsWarper(0.9),
                transformers.MinPLogitsWarper(0.05),
            ]
        )
        ids = torch.tensor([prompt + row for row in written])
        wanted = warpers(ids, logits).softmax(-1)
        sampling = Sampling(
            temperature=1.7, top_k=25, top_p=0.9, min_p=0.05, repetition_penalty=1.3
        )
        got = sampling.probabilities(logits, prompt, written)
        torch.testing.assert_close(got, wanted)
        assert 1 < int((got[0] > 0).sum()) < 25

    def test_a_bias_is_added(self):
        logits = torch.tensor([[1.0, 4.0, 3.0]])
        chances = Sampling(bias={0: 2.5}).probabilities(logits, [1], [[]])
        torch.testing.assert_close(chances, torch.tensor([[3.5, 4.0, 3.0]]).softmax(-1))

    def test_presence_and_frequency_count_the_new_text(self):
        logits = torch.zeros(1, 4)
        sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
        got = sampling.probabilities(logits, [3, 3], [[1, 1, 2]]).log()
        torch.testing.assert_close(got - got[:, :1], torch.tensor([[0.0, -1.0, -0.75, 0.0]]))

    def test_draws_have_the_distribution(self):
        source, chances = random_numbers(0), torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0])
        counts = torch.bincount(
            torch.tensor([draw(chances, source) for _ in range(4000)]), minlength=5
        )
        expected = 4000 * chances
        assert counts[1] == counts[4] == 0
        chi_square = ((counts - expected) ** 2 / expected)[chances > 0].sum()
        assert chi_square < 13.8  # 2 degrees of freedom, p = 0.001

    def test_no_token_left(self):
        with pytest.raises(DataError, match="No token"):
            GREEDY.probabilities(torch.full((1, 4), -torch.inf), [1], [[]])


class TestBeams:
    @pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
    def test_they_are_those_of_transformers(self, length_penalty):
        model = build(LAYOUTS[-2])
        options = {"num_beams": 4, "num_return_sequences": 4, "do_sample": False}
        wanted = model.generate(
            draw_ids(1, 5),
            max_new_tokens=7,
            eos_token_id=sorted(ENDS),
            length_penalty=length_penalty,
            early_stopping="never",
            **options,
        )
        wanted = [[token for token in row[5:].tolist() if token != 39] for row in wanted]
        method = Beams(width=4, length_penalty=length_penalty)
        got = decoded(reader_of(model), method, texts=4, new_tokens=7)
        assert [text.ids for text in got] == wanted
        assert length_penalty > 0 or len({len(ids) for ids in wanted}) > 1  # some have ended

    def test_enough_of_them_find_the_likeliest_text(self):
        model, prompt = (
            build("attention, mamba2", vocabulary=4, pad_token_id=None),
            torch.tensor([[1, 2]]),
        )
        scores = {}
        for text in itertools.product(range(4), repeat=3):
            text = text[: text.index(0) + 1] if 0 in text else text
            ids = torch.tensor([[1, 2, *text]])
            logs = model(ids).logits.log_softmax(-1)[0, 1:-1]
            scores[text] = float(logs.gather(1, ids[0, 2:, None]).sum())
        found = Beams(width=16, length_penalty=0.0).run(
            model, prompt, new_tokens=3, ends=frozenset([0]), texts=5
        )
        best = sorted(scores, key=lambda text: -scores[text])[:5]
        assert [tuple(text.ids) for text in found] == best

    def test_one_beam_is_greedy(self):
        reader = reader_of(build(LAYOUTS[0]))
        (one,), (greedy,) = decoded(reader, Beams(width=1)), decoded(reader, GREEDY)
        assert (one.ids, one.is_ended) == (greedy.ids, greedy.is_ended)
        assert one.log_probability == pytest.approx(greedy.log_probability, rel=1e-5)  # other sums


class TestDiverseBeams:
    def test_one_group_is_beam_search(self):
        for layout in LAYOUTS:
            reader = reader_of(build(layout))
            one = DiverseBeams(groups=1, width=3, strength=2.0)
            assert decoded(reader, one, texts=3) == decoded(reader, Beams(width=3), texts=3)

    def test_without_strength_groups_are_alike(self):
        reader = reader_of(build(LAYOUTS[-1]))
        found = decoded(reader, DiverseBeams(groups=3, width=2, strength=0.0), texts=6)
        beams = decoded(reader, Beams(width=2), texts=2)
        assert [text.ids for text in found] == [text.ids for text in beams for _ in range(3)]

    def test_groups_of_one_beam_are_greedy_with_a_penalty(self):
        """Algorithm 1 of the paper, written down for one beam per group and the Hamming term."""
        model, prompt = build(LAYOUTS[-2]), draw_ids(1, 5)
        groups = [[], [], []]
        for _ in range(6):
            taken = torch.zeros(40)
            for ids in groups:
                text = torch.cat([prompt, torch.tensor([ids], dtype=torch.long)], dim=1)
                logs = model(text).logits[0, -1].log_softmax(-1)
                ids.append(int((logs - 1.5 * taken).argmax()))
                taken[ids[-1]] += 1
        method = DiverseBeams(groups=3, width=1, strength=1.5)
        found = decoded(reader_of(model), method, texts=3, ends=frozenset(), new_tokens=6)
        assert [text.ids for text in found] == groups

    def test_strength_makes_texts_differ(self):
        reader = reader_of(build(LAYOUTS[0]))
        found = decoded(
            reader, DiverseBeams(groups=4, width=1, strength=100.0), texts=4, ends=frozenset()
        )
        for tokens in zip(*(text.ids for text in found), strict=True):
            assert len(set(tokens)) == 4

    def test_ngrams_are_counted(self):
        others = [[1, 2, 3, 1, 2], [2, 1, 2, 9, 9]]
        got = ngrams(2)([[5, 1], [5, 9]], others, 10)
        assert got[0].tolist() == [0, 0, 3, 0, 0, 0, 0, 0, 0, 0]
        assert got[1].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
        assert ngrams(1)([[5]], others, 10)[0, 2] == 4
        assert not ngrams(3)([[5]], others, 10).any()


class TestContrastive:
    @pytest.mark.parametrize("method", [Contrastive(weight=0.0), Contrastive(candidates=1)])
    def test_it_is_greedy_without_contrast_or_choice(self, method):
        reader = reader_of(build(LAYOUTS[-1]))
        assert decoded(reader, method)[0].ids == decoded(reader, GREEDY)[0].ids

    def test_it_takes_the_best_of_the_equation(self):
        model, ids = build(LAYOUTS[-2]), draw_ids(1, 5)
        for _ in range(6):
            chances = model(ids).logits[0, -1].softmax(-1)
            scores = {}
            for token in chances.topk(4).indices:
                text = torch.cat([ids, token.view(1, 1)], dim=1)
                features = model.model.backbone(model.model.embedding(text))[0][0]
                likeness = torch.cosine_similarity(features[-1:], features[:-1]).max()
                scores[int(token)] = float(0.4 * chances[token] - 0.6 * likeness)
            best = max(scores, key=scores.get)
            ids = torch.cat([ids, torch.tensor([[best]])], dim=1)
        found = decoded(reader_of(model), Contrastive(), ends=frozenset(), new_tokens=6)
        assert found[0].ids == ids[0, 5:].tolist()


class Nothing(Constraint):
    """After two tokens none may follow, and the text is no text yet."""

    def allowed(self, ids, vocabulary, ends):
        return torch.full((vocabulary,), len(ids) < 2)

    def is_over(self, ids):
        return False


@pytest.mark.parametrize("name", METHODS)
def test_a_constraint_without_a_way_on_is_an_error(name):
    with pytest.raises(DataError, match="no token to go on with"):
        decoded(reader_of(build("attention")), METHODS[name], constraint=Nothing())


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Sampling(temperature=-1.0), RangeError),
        (lambda: Sampling(temperature=math.nan), RangeError),
        (lambda: Sampling(top_k=0), RangeError),
        (lambda: Sampling(min_p=1.5), RangeError),
        (lambda: Sampling(repetition_penalty=0.0), RangeError),
        (lambda: Sampling(presence_penalty=3.0), RangeError),
        (lambda: Beams(width=0), RangeError),
        (lambda: DiverseBeams(groups=0), RangeError),
        (lambda: DiverseBeams(strength=-1.0), RangeError),
        (lambda: Contrastive(weight=2.0), RangeError),
        (lambda: ngrams(0), RangeError),
        (lambda: Task(prompt=torch.zeros(2, 3), new_tokens=1), ShapeError),
        (lambda: Task(prompt=torch.zeros(1, 3), new_tokens=0), RangeError),
        (lambda: decoded(None, Contrastive(), texts=2), RangeError),
        (lambda: reader_of(torch.nn.Identity()), ConfigError),
    ],
)
def test_bad_options(make, error):
    with pytest.raises(error):
        make()
