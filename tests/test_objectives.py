"""What every objective promises, and what each of them hides and scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seqmix.core.errors import ConfigError, DataError, ShapeError
from seqmix.models.backbone import ModelSpec
from seqmix.models.encoder import SeqmixForMaskedLM
from seqmix.models.future_tokens import FutureTokenModel
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.seq2seq import SeqmixForSeq2SeqLM
from seqmix.objectives import OBJECTIVES, target_logits
from seqmix.objectives._objective import TargetObjective
from seqmix.train.distillation import Distilled, distillation_loss
from seqmix.train.objective import objective_loss, train_objective

WORDS, MASK, VOCABULARY = 20, 20, 32
SIZES = {"width": 16, "heads": 2, "vocabulary": VOCABULARY}


def build(kind: str):
    torch.manual_seed(0)
    if kind == "encoder":
        made = SeqmixForMaskedLM.create("2x[bidirectional_attention]", **SIZES)
    elif kind == "encoder-decoder":
        encoder, decoder = (
            ModelSpec.from_dict({"layout": layout, **SIZES})
            for layout in ("bidirectional_attention", "attention")
        )
        made = SeqmixForSeq2SeqLM.create(encoder, decoder)
    elif kind == "future":
        made = FutureTokenModel(ModelSpec(layout="2x[attention]", **SIZES))
    else:
        made = SeqmixForCausalLM.create(f"2x[{kind}]", **SIZES)
    return made.eval()


MODELS = {  # objective -> the models that it trains
    "causal": ["attention", "gated_linear_attention"],
    "future_tokens": ["future"],
    "insertion": ["encoder"],
    "masked": ["encoder"],
    "masked_diffusion": ["encoder"],
    "masked_target": ["encoder"],
    "masked_with_decoder": ["encoder"],
    "prefix": ["attention", "prefix_attention", "encoder-decoder", "gated_linear_attention"],
    "span_denoising": ["attention", "prefix_attention", "encoder-decoder"],
}
PAIRS = [(name, model) for name, models in MODELS.items() for model in models]


def objective(name: str, **fields):
    kind = OBJECTIVES.get(name)
    ids = {"mask_id": MASK, "vocabulary": WORDS, "first_mark": MASK}
    ids |= {"stop_id": MASK, "pad_id": MASK + 1}
    known = {key: value for key, value in ids.items() if key in kind.Config.fields()}
    return kind(kind.Config.from_dict(known | fields))


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_objective_is_tried():
    assert set(MODELS) == set(OBJECTIVES.names())


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_inputs_follow_the_seed_and_leave_the_text_alone(name):
    made, ids = objective(name), draw(3, 20)
    before = ids.clone()
    one, again, other = (made.inputs(ids, generator(seed)) for seed in (0, 0, 1))
    assert ids.equal(before)
    assert one.keys() == again.keys()
    assert all(one[key].equal(again[key]) for key in one)
    same = all(one[key].equal(other[key]) for key in one)
    assert same == (name == "causal")


@pytest.mark.parametrize(("name", "model"), PAIRS)
def test_training_lowers_the_loss_and_leaves_nothing_behind(name, model):
    made, trained = objective(name), build(model)
    windows = draw(1, 16).expand(4, -1)  # one text, to be learned by heart
    names = set(trained.state_dict())

    def loss() -> float:
        with made.attached(trained):
            return objective_loss(trained, windows, made)

    before = loss()
    assert 0.5 * math.log(VOCABULARY) < before < 2 * math.log(VOCABULARY)
    steps = 80 if name == "insertion" else 15  # where one of several tokens is as good as another
    train_objective(trained, windows, made, steps=steps, batch=4, learning_rate=2e-2)
    assert loss() < 0.8 * before
    assert set(trained.state_dict()) == names


def test_masked_hides_its_share_by_the_three_rules():
    made, ids = objective("masked", share=0.2), draw(200, 50)
    inputs = made.inputs(ids, generator())
    scored = inputs["labels"] != -100
    assert (scored.sum(1) == 10).all()
    assert inputs["labels"][scored].equal(ids[scored])
    shown = inputs["input_ids"]
    assert shown[~scored].equal(ids[~scored])
    count = int(scored.sum())
    as_mask = int((shown[scored] == MASK).sum())
    as_they_are = int((shown[scored] == ids[scored]).sum())
    assert as_mask / count == pytest.approx(0.8, abs=0.03)
    assert as_they_are / count == pytest.approx(0.1 + 0.1 / WORDS, abs=0.03)
    assert int(shown.max()) <= MASK


def test_masked_target_hides_any_number_of_the_last_tokens():
    made, ids = objective("masked_target", tokens=8), draw(200, 20)
    inputs = made.inputs(ids, generator())
    hidden = inputs["input_ids"] == MASK
    assert not hidden[:, :12].any()
    assert hidden.sum(1).unique().tolist() == list(range(1, 9))
    assert inputs["labels"][hidden].equal(ids[hidden])
    assert (inputs["labels"][~hidden] == -100).all()
    assert inputs["input_ids"][~hidden].equal(ids[~hidden])
    with pytest.raises(ShapeError, match="at least 9"):
        made.inputs(ids[:, :8], generator())


def test_masked_with_decoder_reveals_more_from_block_to_block():
    made, ids = objective("masked_with_decoder", blocks=3, share=0.5, decoded=0.3), draw(50, 40)
    inputs = made.inputs(ids, generator())
    scored, hidden = inputs["labels"] != -100, inputs["hidden"]
    assert not (hidden & ~scored).any()
    assert not hidden[-1].any()
    assert (hidden[1] <= hidden[0]).all()
    shares = [float(block[scored].float().mean()) for block in hidden]
    assert shares == pytest.approx([2 / 3, 1 / 3, 0], abs=0.05)
    assert float(inputs["decoded"].float().mean()) == pytest.approx(0.3, abs=0.05)


def test_nobody_reads_a_place_that_is_hidden():
    made, model = objective("masked_with_decoder", blocks=2), build("encoder")
    decoder = made.build(model.config.to_spec())
    x = torch.randn(1, 6, 16, generator=generator())
    hidden = torch.zeros(1, 6, dtype=torch.bool)
    hidden[0, 3] = True
    for block in decoder.blocks:
        block.mixer.hidden = hidden
    other = x.clone()
    other[0, 3] += 1.0
    y, changed = decoder(x)[0], decoder(other)[0]
    kept = torch.arange(6) != 3
    torch.testing.assert_close(y[:, kept], changed[:, kept])
    assert not torch.allclose(y[:, 3], changed[:, 3])


def test_a_decoder_that_is_not_attached_is_missed():
    made = objective("masked_with_decoder")
    with pytest.raises(ConfigError, match="attached"):
        made.loss(build("encoder"), made.inputs(draw(1, 8), generator()))


def test_prefix_cuts_the_text_in_two():
    made, ids = objective("prefix"), draw(2, 9)
    cuts = set()
    for seed in range(60):
        inputs = made.inputs(ids, generator(seed))
        assert torch.cat([inputs["source"], inputs["target"]], dim=1).equal(ids)
        cuts.add(inputs["source"].shape[1])
    assert cuts == set(range(1, 9))


@pytest.mark.parametrize("length", [2, 3, 20, 37])
@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_the_spans_put_back_in_place_give_the_text(length, share):
    made, ids = objective("span_denoising", share=share, mean_span=2.0), draw(5, length)
    inputs = made.inputs(ids, generator())
    hidden, spans = made.config.spans(length)
    assert inputs["source"].shape[1] == length - hidden + spans
    assert inputs["target"].shape[1] == hidden + spans + 1
    for row in range(5):
        target = inputs["target"][row].tolist()
        assert [token for token in target if token >= MASK] == list(range(MASK, MASK + spans + 1))
        text = []
        for token in inputs["source"][row].tolist():
            if token < MASK:
                text.append(token)
            else:
                text += target[target.index(token) + 1 : target.index(token + 1)]
        assert text == ids[row].tolist()


@pytest.mark.parametrize("model", ["attention", "prefix_attention", "encoder-decoder"])
@torch.no_grad()
def test_target_logits_are_what_the_model_would_write(model):
    made, source = build(model), draw(2, 7)
    length = 1 if made.config.is_encoder_decoder else 7
    written = made.generate(source, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    target = written[:, length:]
    assert target_logits(made, source, target).argmax(-1).equal(target)
    assert target_logits(made, source, target[:, :1]).argmax(-1).equal(target[:, :1])


@torch.no_grad()
def test_target_logits_of_a_causal_model_are_those_of_one_call():
    made, source, target = build("attention"), draw(2, 7), draw(2, 4, seed=2)
    whole = made(torch.cat([source, target], dim=1)).logits[:, 6:-1]
    torch.testing.assert_close(target_logits(made, source, target), whole)
    mask = torch.ones_like(source)
    mask[0, :3] = 0
    padded = target_logits(made, source, target, mask)
    torch.testing.assert_close(padded[:1], target_logits(made, source[:1, 3:], target[:1]))
    with pytest.raises(ShapeError, match="left"):
        target_logits(made, source, target, mask.flip(1))


def test_distillation_is_its_equation():
    student, teacher = (torch.randn(2, 3, 5, generator=generator(seed)) for seed in (0, 1))
    labels = torch.tensor([[1, 4, -100], [0, 2, 3]])
    places = labels != -100
    p = (teacher[places] / 3).softmax(-1)
    soft = (p * (p.log() - (student[places] / 3).log_softmax(-1))).sum(-1).mean()
    true = torch.nn.functional.cross_entropy(student[places], labels[places])
    got = distillation_loss(student, teacher, labels, temperature=3.0, weight=0.25)
    torch.testing.assert_close(got, 0.75 * true + 0.25 * 9 * soft)
    alike = distillation_loss(student, student, labels, weight=1.0)
    assert float(alike) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ShapeError, match="same vocabulary"):
        distillation_loss(student, teacher[..., :4], labels)


def test_an_encoder_decoder_learns_from_a_decoder():
    teacher, student = build("attention"), build("encoder-decoder")
    made = Distilled(objective("prefix"), teacher, weight=1.0)
    windows = draw(4, 12)
    before = objective_loss(student, windows, made)
    kept = {name: p.clone() for name, p in teacher.named_parameters()}
    train_objective(student, windows, made, steps=15, batch=4, learning_rate=2e-2)
    assert objective_loss(student, windows, made) < before
    assert all(torch.equal(p, kept[name]) for name, p in teacher.named_parameters())
    assert isinstance(made.objective, TargetObjective)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("masked", {"share": 1.5}),
        ("masked", {"shown_as_mask": 0.8, "shown_as_random": 0.3}),
        ("masked_with_decoder", {"decoded": -0.1}),
        ("masked_with_decoder", {"blocks": 0}),
        ("span_denoising", {"mean_span": 0.5}),
    ],
)
def test_impossible_settings_are_refused(name, fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        objective(name, **fields)


def test_texts_that_are_too_short_are_refused():
    for name in ("causal", "prefix", "span_denoising"):
        with pytest.raises(ShapeError, match="at least 2"):
            objective(name).inputs(draw(3, 1), generator())
    with pytest.raises(DataError, match="windows"):
        train_objective(build("encoder"), draw(8), objective("masked"), steps=1)
