"""Trees of guesses change how fast a text comes, never what it is, drawn or not."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_speculative import Even, Table, perturbed, texts

from seqmix.core.errors import RangeError
from seqmix.core.tree import Tree
from seqmix.generate import Sampling, Shape, SpeculativeTree, TreeLookup, TreeModel
from seqmix.generate._method import Task
from seqmix.generate._reader import Reader, reader_of
from seqmix.generate.sampling import GREEDY
from seqmix.generate.speculative_tree import Guesses, TreeDraft, TreeDrafter, grow
from seqmix.testing.models import build, draw, layouts


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def test_a_tree_knows_its_paths():
    tree = Tree([-1, -1, 0, 0, 2])
    assert tree.depths.tolist() == [0, 0, 1, 1, 2]
    assert [row.nonzero().flatten().tolist() for row in tree.ancestors] == [
        [0],
        [1],
        [0, 2],
        [0, 3],
        [0, 2, 4],
    ]
    assert tree.before(4, 3) == [-1, 0, 2]
    assert tree.before(4, 1) == [2]
    assert tree.before(1, 2) == [-2, -1]
    assert torch.equal(tree.paths[tree.rows, tree.depths], torch.arange(5))
    assert tree.paths.tolist() == [[1, 1, 1], [0, 3, 3], [0, 2, 4]]
    for parents in ([0], [-1, 2, 1], [-2]):
        with pytest.raises(RangeError, match="Tree"):
            Tree(parents)


@pytest.mark.parametrize("layout", [*layouts(), "positions"])
def test_a_tree_is_read_in_one_pass_as_path_by_path(layout):
    options = {"positions": 30} if layout == "positions" else {}
    reader = reader_of(build("2x[attention]" if options else layout, **options))
    ids, tree = draw(1, 12), Tree([-1, -1, 0, 1, 1, 3])
    state = reader.read(ids[:, :4]).state
    got = reader.read_tree(ids[:, 4:], state, tree)
    wanted = Reader.read_tree(reader, ids[:, 4:], state, tree)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.features, wanted.features, rtol=1e-4, atol=1e-4)
    after = [reader.read(ids[:, :3], each.state).logits for each in (got, wanted)]
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["2x[mamba]", "gated_linear_attention, attention"])
def test_greedy_text_is_the_same(layout):
    model = build(layout)
    (wanted,) = texts(model, GREEDY)
    drafter = TreeModel(perturbed(layout, 0.1), Shape(depth=3, width=2, nodes=5))
    (got,) = texts(model, SpeculativeTree(drafter=drafter))
    assert got.ids == wanted.ids
    assert got.log_probability == pytest.approx(wanted.log_probability, abs=1e-3)


@pytest.mark.parametrize("drafter", ["model", "lookup"])
def test_drawn_texts_are_the_same(drafter):
    layout = "mamba2, attention(window=5)"
    model = build(layout)
    made = TreeModel(perturbed(layout, 0.1)) if drafter == "model" else TreeLookup(1)
    for sampling in (Sampling(), Sampling(temperature=0.7, top_k=5, repetition_penalty=1.5)):
        options = {"texts": 2, "seed": 2, "length": 12}
        wanted = texts(model, sampling, **options)
        got = texts(model, SpeculativeTree(drafter=made, sampling=sampling), **options)
        assert [text.ids for text in got] == [text.ids for text in wanted]
    (wanted,) = texts(model, GREEDY, constraint=Even())
    (got,) = texts(model, SpeculativeTree(drafter=made), constraint=Even())
    assert got.ids == wanted.ids


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_models_of_transformers_read_trees_path_by_path(kind):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40}
    if kind == "llama":
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.mul_(2)
    (wanted,) = texts(model, GREEDY, length=10)
    (got,) = texts(model, SpeculativeTree(drafter=TreeModel(build("attention"))), length=10)
    assert got.ids == wanted.ids


def test_a_perfect_drafter_saves_checks_and_texts_end_in_time():
    model = build("mamba2, attention")
    method = SpeculativeTree(drafter=TreeModel(model, Shape(depth=4, width=1, nodes=4)))
    (plain,) = texts(model, GREEDY, length=26)
    (got,) = texts(model, method, length=26)
    assert (got.ids, got.checks) == (plain.ids, 5)  # a token after the prompt, then five at a time
    seen = []
    end = plain.ids[6]
    (got,) = texts(model, method, length=26, ends=frozenset({end}), emit=seen.append)
    assert got.is_ended
    assert seen == got.ids == plain.ids[: plain.ids.index(end) + 1]
    circle = Table(100 * torch.eye(5).roll(1, dims=1))
    options = {"prompt": draw(1, 2) % 5, "length": 40}
    (found,) = texts(circle, SpeculativeTree(drafter=TreeLookup()), **options)
    assert found.ids == texts(circle, GREEDY, **options)[0].ids
    assert found.checks <= 6 + 40 / 5


def test_the_likeliest_nodes_are_kept():
    chances = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05], [0.5, 0.4, 0.1]])

    def extend(rows, tokens):
        assert all(row == 0 for row in rows)
        return chances[[1 + token for token in tokens]].log()

    guesses = grow(Shape(depth=2, width=2, nodes=4), chances[:1].log(), extend)
    # 0.6, 0.6 * 0.9, 0.3, 0.3 * 0.5
    assert sorted(zip(guesses.parents, guesses.tokens, strict=True)) == [
        (-1, 0),
        (-1, 1),
        (0, 0),
        (1, 0),
    ]


def test_looked_up_continuations_share_their_beginnings():
    prompt = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 5, 9, 2, 6, 1, 2]])
    draft = TreeLookup(2, Shape(depth=2, nodes=6)).start(Task(prompt=prompt, new_tokens=1))
    guesses = draft.guess([], torch.empty(0, 1))
    assert guesses == Guesses([-1, 0, 0, -1, 3], [3, 5, 4, 6, 1])


class Recording(TreeDrafter, TreeDraft):
    """Guesses what plain decoding writes, beside something else, and keeps the features that it is given."""

    def __init__(self, ids):
        self.ids, self.features = ids, []

    def start(self, task):
        return self

    def guess(self, written, features):
        self.features.append(features)
        a, b, c = self.ids[len(written) :][:3] if len(self.ids) > len(written) + 3 else (0, 0, 0)
        return Guesses([-1, -1, 1, 2], [(a + 1) % 40, a, b, (c + 1) % 40])


def test_drafters_get_the_features_of_every_token_once():
    model, prompt = build("mamba2, attention"), draw(1, 5)
    (plain,) = texts(model, GREEDY, length=14, prompt=prompt)
    drafter = Recording(plain.ids)
    (got,) = texts(model, SpeculativeTree(drafter=drafter), length=14, prompt=prompt)
    assert got.ids == plain.ids
    given = torch.cat(drafter.features)
    wanted = reader_of(model).read(torch.cat([prompt, torch.tensor([plain.ids])], dim=1))
    torch.testing.assert_close(given, wanted.features[0, : len(given)], rtol=1e-4, atol=1e-4)
    assert len(given) > 14
