"""Pruning: what goes is gone, and the rest computes what it did."""

import pytest
import torch

from seqmix.compress import TRANSFORMS, Calibration, Work, axformer
from seqmix.compress._cut import cut
from seqmix.compress._greedy import divergence
from seqmix.compress._structure import (
    flops_per_unit,
    masked,
    parameters_per_unit,
    sublayer,
    sublayers,
    units_of,
    without,
)
from seqmix.core.errors import ConfigError, DataError
from seqmix.models.backbone import ModelSpec
from seqmix.models.encoder import SeqmixForSequenceClassification
from seqmix.models.hf import SeqmixConfig, SeqmixForCausalLM, create

LAYOUTS = {
    "attention": "2x[attention(heads=4, key_heads=2, bias=true)/glu(hidden=24)]",
    "mamba": "2x[mamba/mlp(hidden=16, bias=true)]",
    "mamba2": "2x[mamba2/squared_relu(hidden=16)]",
    "hybrid": "gated_delta_net/glu(hidden=16), attention/glu(hidden=16)",
    "experts": "2x[attention/mixture_of_experts(experts=6, active=2, hidden=12)]",
}


@pytest.fixture(params=LAYOUTS)
def model(request):
    return small(LAYOUTS[request.param])


def small(layout):
    return create(layout, width=32, vocabulary=50).eval()


def text(rows=2, length=12):
    return Calibration(windows=torch.randint(0, 50, (rows, length)))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def some(count, share=0.5):
    return sorted(torch.randperm(count)[: max(2, int(count * share))].tolist())


def test_keeping_everything_changes_nothing(model):
    ids = text().windows
    kept = {place: range(units.count) for place, units in units_of(model).items()}
    close(logits(cut(model, kept), ids), logits(model, ids))


def test_a_cut_model_equals_the_masked_one_and_is_as_much_smaller_as_promised(model):
    ids = text().windows
    units = units_of(model)
    kept = {p: some(u.count) for p, u in units.items() if u.entrances}
    masks = {
        p: torch.zeros(units[p].count).index_fill(0, torch.tensor(k), 1) for p, k in kept.items()
    }
    with masked(model, masks):
        wanted = logits(model, ids)
    pruned = cut(model, kept)
    close(logits(pruned, ids), wanted, 1e-3)
    assert not torch.allclose(wanted, logits(model, ids), atol=1e-3)
    gone = sum(
        parameters_per_unit(sublayer(model, p), units[p]) * (units[p].count - len(k))
        for p, k in kept.items()
    )
    assert model.num_parameters() - pruned.num_parameters() == gone
    saved = sum(
        flops_per_unit(model, p, units[p], 64) * (units[p].count - len(k)) for p, k in kept.items()
    )
    flops = model.model.cost(64).flops - pruned.model.cost(64).flops
    assert flops == pytest.approx(saved, rel=1e-6)


def test_experts_that_no_token_takes_can_go():
    model = small(LAYOUTS["experts"])
    ids = text().windows
    for block in model.model.backbone.blocks:
        block.channel.balance[[1, 4]] = -10.0  # the choice never falls on them
    kept = {(number, "channel"): [0, 2, 3, 5] for number in range(2)}
    pruned = cut(model, kept)
    close(logits(pruned, ids), logits(model, ids))
    assert len(pruned.model.backbone.blocks[0].channel.experts) == 4
    with pytest.raises(ConfigError, match="every token takes 2"):
        cut(model, {(0, "channel"): [3]})


def test_channels_of_the_residual_stream_that_are_zero_can_go():
    model = small("attention(heads=4, key_heads=2), mamba/mlp, mamba2/squared_relu")
    channels = sorted(set(range(32)) - {3, 17, 30})
    zero = [3, 17, 30]
    with torch.no_grad():
        model.model.embedding.weight[:, zero] = 0
        for place in sublayers(model):
            sublayer(model, place).output.weight[zero] = 0
    ids = text().windows
    pruned = cut(model, {}, channels=channels)
    assert pruned.config.hidden_size == 29
    close(logits(pruned, ids), logits(model, ids), 1e-4)


def test_a_removed_sublayer_is_gone_and_the_model_saves_and_loads(model, tmp_path):
    ids = text().windows
    place = (1, "mixer")
    before = logits(model, ids)
    with without(model, [place]):
        wanted = logits(model, ids)
    pruned = cut(model, {place: ()})
    close(logits(pruned, ids), wanted)
    assert not any("blocks.1.mixer" in name for name in pruned.state_dict())
    pruned.save_pretrained(tmp_path)
    close(logits(SeqmixForCausalLM.from_pretrained(tmp_path), ids), wanted)
    close(logits(model, ids), before)


def test_what_has_no_units_is_refused():
    model = small("linear_attention")
    with pytest.raises(ConfigError, match="has no heads"):
        cut(model, {(0, "mixer"): [0]})
    sliced = create("attention", width=32, vocabulary=50, shortcuts=True)
    with pytest.raises(ConfigError, match="Prune before slicing"):
        cut(sliced, {(0, "mixer"): ()})


@pytest.mark.parametrize(
    "layout", ["3x[attention]", "3x[linear_attention]", "mamba, 2x[attention]"]
)
def test_finercut_takes_useless_sublayers_first(layout):
    model = small(layout)
    useless = [(0, "channel"), (2, "mixer")]
    with torch.no_grad():
        for place in useless:
            sublayer(model, place).output.weight.zero_()
    work = Work()
    data = text()
    pruned = TRANSFORMS.get("finercut")(remove=1 / 3, tokens=24).fit(model, data, work)
    assert {(r["block"], r["part"]) for r in work.notes["removed"]} == set(useless)
    close(logits(pruned, data.windows), logits(model, data.windows))
    assert len(sublayers(pruned)) == 4
    assert len(sublayers(model)) == 6


def test_finercut_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    from seqmix.compress import _greedy as greedy

    model, data = small("3x[attention]"), text()
    transform = TRANSFORMS.get("finercut")(remove=0.5)
    whole = Work()
    transform.fit(model, data, whole)
    calls = []
    measure = greedy._cheapest

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(greedy, "_cheapest", stop)
    with pytest.raises(KeyboardInterrupt):
        transform.fit(model, data, Work(folder=tmp_path))
    work = Work(folder=tmp_path)
    transform.fit(model, data, work)
    assert work.notes == whole.notes
    assert len(calls) == 5  # two, and then three steps


def test_finercut_reuses_what_another_amount_has_measured(tmp_path, monkeypatch):
    from seqmix.compress import _greedy as greedy

    model, data, kind = small("3x[attention]"), text(), TRANSFORMS.get("finercut")
    kind(remove=0.34).fit(model, data, Work(folder=tmp_path))
    calls, measure = [], greedy._cheapest
    monkeypatch.setattr(greedy, "_cheapest", lambda *given: calls.append(1) or measure(*given))
    more, alone = Work(folder=tmp_path), Work()
    kind(remove=0.5).fit(model, data, more)
    assert len(calls) == 2  # of three steps
    kind(remove=0.5).fit(model, data, alone)
    assert more.notes == alone.notes
    assert kind(remove=0.5).whatever_amount == kind(remove=0.34).whatever_amount
    assert kind(remove=0.5).whatever_amount != kind(remove=0.5, tokens=8).whatever_amount


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_finercut_takes_the_cheapest_of_all_candidates(power):
    """The order that trying every candidate at every step gives; of two blocks, each is beside the other."""
    model, data = small("2x[attention]"), text(rows=1)
    work, gone = Work(), []
    TRANSFORMS.get("finercut")(remove=0.75, power=power).fit(model, data, work)
    whole, so_far = logits(model, data.windows).log_softmax(-1), 0.0
    while left := 3 - len(gone):
        places = [place for place in sublayers(model) if place not in gone]
        pairs = [[(n, "mixer"), (n, "channel")] for n in range(2)]
        candidates = [[place] for place in places] + [p for p in pairs if not set(p) & set(gone)]
        prices, changes = [], []
        for some in candidates:
            made = cut(model, dict.fromkeys([*gone, *some], ()))
            changes.append(divergence(whole, logits(made, data.windows).log_softmax(-1)))
            size = sum(p.numel() for q in some for p in sublayer(model, q).parameters())
            price = (changes[-1] - so_far) / size**power
            prices.append(price if len(some) <= left else float("inf"))
        best = prices.index(min(prices))
        gone += candidates[best]
        so_far = changes[best]
    assert [(r["block"], r["part"]) for r in work.notes["removed"]] == gone


def test_blocks_takes_the_useless_block():
    model = small("3x[attention]")
    with torch.no_grad():
        for part in ("mixer", "channel"):
            sublayer(model, (1, part)).output.weight.zero_()
    work = Work()
    pruned = TRANSFORMS.get("blocks")(remove=0.34).fit(model, text(), work)
    assert [r["block"] for r in work.notes["removed"]] == [1]
    assert sublayers(pruned) == [(0, "mixer"), (0, "channel"), (2, "mixer"), (2, "channel")]


def test_magnitude_takes_the_smallest_units(model):
    planted = {}
    with torch.no_grad():
        for place, units in units_of(model).items():
            planted[place] = units.count - 1
            module = sublayer(model, place)
            if units.experts:
                for weight in module.experts[-1].parameters():
                    weight.mul_(0.01)
            for name, (dimension, sections) in units.axes.items():
                tensor = dict(module.named_parameters()).get(name)
                if tensor is not None and tensor.ndim > 1 and len(sections) == 1:
                    size = sections[0].rows
                    tensor.narrow(dimension, tensor.shape[dimension] - size, size).mul_(0.01)
    units = units_of(model)
    least = max(
        parameters_per_unit(sublayer(model, p), u)
        / sum(parameters_per_unit(sublayer(model, q), v) * v.count for q, v in units.items())
        for p, u in units.items()
    )
    work = Work()
    pruned = TRANSFORMS.get("magnitude")(remove=0.3).fit(model, text(), work)
    whole = sum(parameters_per_unit(sublayer(model, p), u) * u.count for p, u in units.items())
    gone = model.num_parameters() - pruned.num_parameters()
    assert 0.3 <= gone / whole <= 0.3 + least + 0.05


def test_magnitude_leaves_out_a_planted_neuron():
    model = small("attention(heads=4)/mlp(hidden=16)")
    channel = sublayer(model, (0, "channel"))
    with torch.no_grad():
        channel.up.weight[5] = 0
        channel.output.weight[:, 5] = 0
    pruned = TRANSFORMS.get("magnitude")(remove=0.001).fit(model, text(), Work())
    ids = text().windows
    close(logits(pruned, ids), logits(model, ids))
    assert sublayer(pruned, (0, "channel")).config.hidden == 15


def test_optin_takes_units_that_change_nothing_first(model):
    if not any(u.entrances for u in units_of(model).values()):
        pytest.skip("no units that are masked")
    places = [p for p, u in units_of(model).items() if u.entrances and p[1] == "channel"]
    places = places or [p for p, u in units_of(model).items() if u.entrances]
    with torch.no_grad():
        for place in places:
            weight = sublayer(model, place).output.weight
            weight[:, : 2 * units_of(model)[place].size] = 0
    data, work = text(), Work()
    saved = sum(2 * flops_per_unit(model, p, units_of(model)[p], 12) for p in places)
    share = saved / model.model.backbone.cost(12).flops
    pruned = TRANSFORMS.get("optin")(remove=share * 0.99, tokens=24, groups=None).fit(
        model, data, work
    )
    close(logits(pruned, data.windows), logits(model, data.windows))
    assert work.notes["operations left"] == pytest.approx(1 - share, rel=1e-3)


def test_optin_prunes_classifiers_too():
    spec = ModelSpec(layout="2x[bidirectional_attention/mlp(hidden=16)]", width=32, vocabulary=50)
    config = SeqmixConfig.from_spec(spec, num_labels=3)
    model = SeqmixForSequenceClassification(config).eval()
    pruned = TRANSFORMS.get("optin")(remove=0.3, tokens=24).fit(model, text(), Work())
    assert pruned(input_ids=text().windows).logits.shape == (2, 3)
    assert pruned.num_parameters() < model.num_parameters()


def test_uncurl_merges_experts_that_are_alike_but_for_the_order_of_their_neurons():
    model = small("2x[attention/mixture_of_experts(experts=6, active=1, hidden=12)]")
    pairs = [(0, 3), (1, 4), (2, 5)]
    with torch.no_grad():
        for block in model.model.backbone.blocks:
            channel = block.channel
            for first, second in pairs:
                order = torch.randperm(12)
                a, b = channel.experts[first], channel.experts[second]
                b.gate.weight.copy_(a.gate.weight[order])
                b.up.weight.copy_(a.up.weight[order])
                b.output.weight.copy_(a.output.weight[:, order])
                channel.router.weight[second] = channel.router.weight[first]
    work, data = Work(), text()
    merged = TRANSFORMS.get("uncurl")(factor=2).fit(model, data, work)
    close(logits(merged, data.windows), logits(model, data.windows))
    for found in work.notes["experts"].values():
        assert sorted(map(tuple, map(sorted, found["clusters"]))) == pairs
    assert len(merged.model.backbone.blocks[0].channel.experts) == 3
    with pytest.raises(ConfigError, match="no mixture"):
        TRANSFORMS.get("uncurl")().fit(small("attention"), data, Work())


def test_spectral_clusters_find_blocks_and_leave_none_empty():
    from seqmix.compress.uncurl import spectral_clusters

    affinity = torch.block_diag(*(torch.ones(n, n) for n in (3, 1, 2))).double() + 1e-3
    assert sorted(spectral_clusters(affinity, 3)) == [[0, 1, 2], [3], [4, 5]]
    groups = spectral_clusters(torch.ones(5, 5).double(), 4)
    assert len(groups) == 4
    assert all(groups)


@pytest.mark.parametrize("layout", ["attention", "mamba", "hybrid", "experts"])
def test_folded_masks_act_as_the_masks_did(layout):
    from seqmix.compress.vtrans import Masks

    model = small(LAYOUTS[layout])
    masks, ids = Masks(model), text().windows
    with torch.no_grad():
        for place in masks.mean:
            masks.mean[place].uniform_(0.5, 1.5)
            masks.variance[place].fill_(-100.0)
    with masks.applied():
        wanted = logits(model, ids)
    assert not torch.allclose(wanted, logits(model, ids), atol=1e-3)
    close(logits(masks.folded(), ids), wanted, 1e-4)


def test_vtrans_takes_units_and_channels_that_carry_nothing():
    model = small("2x[attention(heads=4)/glu(hidden=16)]")
    with torch.no_grad():
        for place in sublayers(model):
            sublayer(model, place).output.weight[[3, 9]] = 0
        model.model.embedding.weight.mul_(20)  # so that predictions differ
        model.model.embedding.weight[:, [3, 9]] = 0
        for number in range(2):
            sublayer(model, (number, "channel")).output.weight[:, :4] = 0
    work = Work()
    before = logits(model, text().windows[:1] * 0)
    pruned = TRANSFORMS.get("vtrans")(remove=0.1, steps=40, strength=0.1).fit(model, text(8), work)
    assert work.notes["channels"] <= 30
    assert model.model.embedding.weight.shape == (50, 32)
    for number in range(2):
        channel = sublayer(pruned, (number, "channel"))
        assert (channel.output.weight.norm(dim=0) > 0).sum() == 12  # none of those that write
    assert work.notes["weights left"] == pytest.approx(0.9, abs=0.05)
    close(logits(model, text().windows[:1] * 0), before)


def test_vtrans_trains_weights_where_it_is_told_to():
    model = small(LAYOUTS["attention"])
    data = text(8)
    make = TRANSFORMS.get("vtrans")
    torch.manual_seed(0)
    frozen = make(remove=0.0, steps=2).fit(model, data, Work())
    trained = make(remove=0.0, steps=2, rate=1e-2).fit(model, data, Work())
    norm = "model.backbone.norm.weight"  # no mask is folded into it
    assert torch.equal(frozen.state_dict()[norm], model.state_dict()[norm])
    assert not torch.equal(trained.state_dict()[norm], model.state_dict()[norm])
    assert all(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("layout", ["attention", "mamba", "hybrid", "experts"])
def test_axformer_takes_what_does_not_help_and_is_no_worse(layout):
    model = small(LAYOUTS[layout])
    work, data = Work(), text(4)
    with torch.no_grad():
        sublayer(model, (1, "mixer")).output.weight.zero_()
    pruned = TRANSFORMS.get("axformer")().fit(model, data, work)
    before, after = work.notes["loss"]
    assert after <= before
    assert "1 mixer" in work.notes["removed"]
    found = pruned(input_ids=data.windows, labels=data.windows, use_cache=False).loss.detach()
    assert float(found) == pytest.approx(after, rel=1e-4)
    assert len(sublayers(model)) == 4


def test_axformer_keeps_what_the_task_needs():
    model = small("attention(heads=4)/mlp(hidden=16)")
    ids = torch.arange(50).repeat(2)[None, :24]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    work = Work()
    TRANSFORMS.get("axformer")().fit(model, Calibration(windows=ids), work)
    assert work.notes["removed"] != ["0 channel", "0 mixer"]
    assert work.notes["loss"][1] <= work.notes["loss"][0]


@torch.no_grad()
def test_axformer_leaves_queries_the_keys_that_the_task_needs():
    """Scores so sharp that every query reads one key, but in the first layer, whose queries read all alike."""
    model = small("2x[attention(heads=2)/glu(hidden=8)]")
    first, last = (sublayer(model, (number, "mixer")) for number in range(2))
    first.query.weight.zero_()
    last.query.weight.mul_(1e4)
    data = Calibration(windows=torch.randint(0, 50, (4, 24)))
    before = model(input_ids=data.windows, labels=data.windows, use_cache=False).loss
    work = Work()
    whole = TRANSFORMS.get("axformer")(tolerance=1e-4, groups=1, keys=2)
    bar = float(before) * (1 + whole.tolerance)
    task = axformer._Task(model, data.windows, None)
    chosen = whole._select(task, bar, work)
    assert chosen[1] == 2
    assert chosen.get(0, 24) > 2
    assert sublayer(model, (1, "mixer")).config.best is None  # tried, and put back
    hard = axformer._hardened(model, chosen)
    assert "best=2" in hard.config.to_spec().layout
    after = hard(input_ids=data.windows, labels=data.windows, use_cache=False).loss
    assert float(after) <= bar * (1 + 1e-6)


def test_axformer_with_hard_attention_is_no_worse_and_reads_less():
    torch.manual_seed(1)
    model = small("3x[attention(heads=4)/mlp(hidden=16)]")
    data, work = text(6, 24), Work()
    pruned = TRANSFORMS.get("axformer")(groups=2, keys=2).fit(model, data, work)
    before, after = work.notes["loss"]
    found = pruned(input_ids=data.windows, labels=data.windows, use_cache=False).loss.detach()
    assert float(found) == pytest.approx(after, rel=1e-4)
    assert after <= before * (1 + 1e-6)
    assert work.notes["keys"]
    for place, keys in work.notes["keys"].items():
        assert sublayer(pruned, (int(place.split()[0]), "mixer")).config.best == keys


def test_axformer_prunes_a_classifier_by_its_labels():
    spec = ModelSpec(layout="2x[bidirectional_attention/mlp(hidden=16)]", width=32, vocabulary=50)
    model = SeqmixForSequenceClassification(SeqmixConfig.from_spec(spec, num_labels=3)).eval()
    windows = text(6).windows
    data = Calibration(windows=windows, labels=torch.randint(3, (6,)))
    work = Work()
    pruned = TRANSFORMS.get("axformer")().fit(model, data, work)
    found = pruned(input_ids=windows, labels=data.labels).loss.detach()
    assert float(found) == pytest.approx(work.notes["loss"][1], rel=1e-4)
    with pytest.raises(DataError, match="labels"):
        TRANSFORMS.get("axformer")().fit(model, Calibration(windows=windows), Work())
