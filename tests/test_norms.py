"""Progressive batch norms: what they are on the way, and that folding them changes nothing."""

import pytest
import torch
import torch.nn.functional as F

from seqmix.compress import Calibration, Work, parse_recipe
from seqmix.compress.fold_norms import FoldNorms
from seqmix.core.errors import ConfigError
from seqmix.layers.progressive_norm import ProgressiveNorm, switch_over
from seqmix.models.hf import SeqmixForCausalLM, create
from seqmix.objectives import OBJECTIVES
from seqmix.train.objective import train_objective

LAYOUTS = {
    "attention": "2x[attention(heads=4, key_heads=2)/glu]",
    "biases": "2x[attention(bias=true, output_bias=true)/mlp(bias=true)]",
    "simplified": "linear_attention(feature_map=relu, convolution_size=3)/mlp, attention/none",
}
NOTHING = Calibration(windows=torch.zeros(1, 2, dtype=torch.long))


def ids(rows=4, length=16):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(1))


def model_of(layout, **fields):
    torch.manual_seed(0)
    return create(layout, width=32, vocabulary=50, **({"norm": "progressive_batch"} | fields))


@pytest.fixture(params=LAYOUTS)
def switched(request):
    """A model that has been trained until its layer norms have gone, and a little longer."""
    model = model_of(LAYOUTS[request.param])
    switch_over(model, 4)
    train_objective(model, ids(), OBJECTIVES.get("causal")(), steps=6, batch=4, learning_rate=1e-2)
    return model.eval()


@torch.no_grad()
def logits(model, text):
    return model(input_ids=text, use_cache=False).logits


def test_the_norm_starts_as_a_layer_norm_and_ends_as_a_batch_norm():
    norm = ProgressiveNorm(8)
    switch_over(norm, 2)
    x = torch.randn(3, 5, 8) * 2 + 1
    layer = F.layer_norm(x, (8,), eps=1e-5)
    flat = x.flatten(0, 1)
    batch = (flat - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    batch = batch.view_as(x) + x
    torch.testing.assert_close(norm(x), layer)
    torch.testing.assert_close(norm(x), (layer + batch) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm(x), batch, rtol=1e-4, atol=1e-5)
    assert norm.layer_share == 0


def test_evaluation_reads_every_text_on_its_own_and_does_not_count_as_a_step():
    norm = ProgressiveNorm(8).eval()
    switch_over(norm, 0)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(norm(x)[1:2], norm(x[1:2]))
    a, b = norm.affine()
    torch.testing.assert_close(norm(x), a * x + b)
    assert int(norm.passes) == 0


def test_folding_changes_no_output_and_leaves_no_norm(switched):
    text, before = ids(2, 12), {n: t.clone() for n, t in switched.state_dict().items()}
    work = Work()
    folded = FoldNorms().fit(switched, NOTHING, work)
    torch.testing.assert_close(logits(folded, text), logits(switched, text), rtol=1e-4, atol=1e-4)
    assert work.notes["norms"] > 2
    assert not any("_norm" in name for name in folded.state_dict())
    assert folded.num_parameters() < switched.num_parameters()
    assert all(tensor.equal(before[name]) for name, tensor in switched.state_dict().items())


def test_folded_models_save_and_go_on_to_other_steps(switched, tmp_path):
    text = ids(2, 12)
    folded = FoldNorms().fit(switched, NOTHING, Work())
    folded.save_pretrained(tmp_path)
    assert logits(SeqmixForCausalLM.from_pretrained(tmp_path), text).equal(logits(folded, text))
    (rounding,) = parse_recipe("int8")
    rounded = rounding.fit(folded, NOTHING, Work())
    assert F.cosine_similarity(logits(rounded, text), logits(folded, text), dim=-1).min() > 0.95


def test_a_model_in_the_middle_of_its_switch_saves_how_far_it_is(tmp_path):
    model = model_of(LAYOUTS["attention"])
    switch_over(model, 10)
    train_objective(model, ids(), OBJECTIVES.get("causal")(), steps=4, batch=4, learning_rate=1e-2)
    model.save_pretrained(tmp_path)
    loaded = SeqmixForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.backbone.norm.layer_share == pytest.approx(0.6)
    assert logits(loaded, ids()).equal(logits(model, ids()))


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("attention", {"norm": "rms"}, "norm='rms' divides"),
        ("attention", {}, "100% of the layer norm is left"),
        ("mamba", {}, "is mamba"),
        ("attention", {"residual": "sandwich"}, "residual='sandwich'"),
    ],
)
def test_what_cannot_be_folded_is_named(layout, fields, message):
    with pytest.raises(ConfigError, match=message):
        FoldNorms().fit(model_of(layout, **fields), NOTHING, Work())
