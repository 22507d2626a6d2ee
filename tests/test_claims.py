"""Every claim's quick size runs and reports; the framework gives verdicts that can differ."""

import json

import pytest
import torch

from seqmix.claims import CLAIMS, Run, compare_groups, reproduce
from seqmix.claims._attention_by import attention_by
from seqmix.claims._claim import overall
from seqmix.core.errors import ConfigError, UnknownName
from seqmix.models.backbone import LanguageModel, ModelSpec


@pytest.mark.parametrize("name", CLAIMS.names())
def test_quick_size_measures_every_statement(name, tmp_path):
    record = reproduce(name, size="quick", out=tmp_path)
    assert record["findings"], "a claim measures something"
    for finding in record["findings"]:
        assert all(finding[part] for part in ("statement", "expected", "measured"))
        assert finding["verdict"] in ("reproduced", "not reproduced", "inconclusive")
    on_disk = json.loads((tmp_path / f"{name.replace('_', '-')}.json").read_text())
    assert on_disk["verdict"] == overall([f["verdict"] for f in record["findings"]])
    assert not list(tmp_path.glob(".*partial*"))


def test_an_unknown_claim_is_refused_with_suggestions():
    with pytest.raises(UnknownName, match="Known"):
        reproduce("deltanett")


def test_an_unknown_size_is_refused():
    with pytest.raises(ConfigError, match="quick, full"):
        reproduce("deltanet", size="huge")


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    memory = tmp_path / "memory.json"
    calls = []

    def costly():
        calls.append(1)
        return {"accuracy": 0.5}

    assert Run({"seeds": 1}, memory).remember("a", costly) == {"accuracy": 0.5}
    assert Run({"seeds": 1}, memory).remember("a", costly) == {"accuracy": 0.5}
    assert len(calls) == 1
    Run({"seeds": 2}, memory).remember("a", costly)  # other settings: measured again
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("better", "worse", "margin", "verdict"),
    [
        ([0.9, 0.92], [0.5, 0.52], 0.0, "reproduced"),
        ([0.5, 0.52], [0.9, 0.92], 0.0, "not reproduced"),
        ([0.5, 0.9], [0.4, 0.8], 0.0, "inconclusive"),
        ([0.9], [0.85], 0.1, "not reproduced"),
        ([0.9], [0.7], 0.1, "reproduced"),
        ([float("nan")], [0.7], 0.0, "inconclusive"),
    ],
)
def test_verdicts_follow_the_evidence(better, worse, margin, verdict):
    assert compare_groups(better, worse, margin=margin) == verdict


@pytest.mark.parametrize("layout", ["attention", "bidirectional_attention", "2x[attention]"])
def test_another_function_computes_the_attention_of_a_model_and_then_no_longer(layout):
    torch.manual_seed(0)
    model = LanguageModel(ModelSpec(layout=layout, width=16, heads=2)).eval()
    ids = torch.arange(6).view(1, 6)
    with torch.inference_mode():
        before, state = model(ids)
        texts = [(ids, None)]
        if layout != "bidirectional_attention":
            texts.append((ids[:, :1], state))  # a step of decoding
        wanted = [model(*text)[0] for text in texts]
        with attention_by(lambda q, k, v, **options: q.new_zeros(q.shape)) as seconds:
            for text, logits in zip(texts, wanted, strict=True):
                assert not torch.equal(model(*text)[0], logits)
        assert len(seconds) == len(texts) * len(model.backbone.blocks)
        assert torch.equal(model(ids)[0], before)


def test_one_failed_statement_fails_the_claim():
    assert overall(["reproduced", "reproduced"]) == "reproduced"
    assert overall(["reproduced", "inconclusive"]) == "inconclusive"
    assert overall(["reproduced", "not reproduced"]) == "not reproduced"
