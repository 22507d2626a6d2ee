"""Open GPT models: the families that a survey names compute the same from the blocks of this package."""

from __future__ import annotations

from typing import Any

import torch

from seqmix.claims._claim import Claim, Finding, Run
from seqmix.core.extras import require
from seqmix.models.pretrained import ASSETS, load

LARGEST_ERROR = 1e-4  # of logits in float32, relative to the largest
SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SMALL, "intermediate_size": 52, "num_key_value_heads": 2, "head_dim": 10}
FAMILIES: dict[
    str, dict[str, dict[str, Any]]
] = {  # of the survey -> configurations of transformers
    "GPT-2": {"GPT2Config": {**SMALL, "n_inner": 52}},
    "GPT-NeoX": {"GPTNeoXConfig": {**SMALL, "intermediate_size": 52}},
    "OPT": {"OPTConfig": {**SMALL, "ffn_dim": 52}},
    "Llama-like": {"LlamaConfig": GATED, "MistralConfig": {**GATED, "sliding_window": 5}},
    "Qwen": {"Qwen2Config": {**GATED, "head_dim": 8}, "Qwen3Config": GATED},
    "Gemma": {"GemmaConfig": GATED, "Gemma3TextConfig": {**GATED, "sliding_window": 5}},
    "Mamba": {
        "MambaConfig": {**SMALL, "state_size": 5},
        "Mamba2Config": {
            **{k: v for k, v in SMALL.items() if k != "num_attention_heads"},
            "num_heads": 6,
            "head_dim": 16,
            "n_groups": 2,
            "state_size": 5,
        },
    },
    "RWKV": {"RwkvConfig": {**SMALL, "rescale_every": 0}},
}
ENCODERS: dict[str, dict[str, Any]] = {"BERT": {"BertConfig": {**SMALL, "intermediate_size": 52}}}


def measure(run: Run) -> list[Finding]:
    kinds = {**FAMILIES, **ENCODERS}
    found = {name: run.remember(name, lambda n=name: differences(n, run)) for name in kinds}
    read = {name: rows for name, rows in found.items() if "refused" not in rows}
    worst = max(error for rows in read.values() for row in rows.values() for error in row.values())
    findings = [
        Finding(
            "A model of a family that is read computes the same here, and back in transformers.",
            f"largest difference of logits (encoders: features) at most {LARGEST_ERROR:g} of the largest, in float32, "
            "for small random models with random norms and biases, there and back",
            {"largest": worst, "by family": read},
            "reproduced" if worst <= LARGEST_ERROR else "not reproduced",
        ),
        Finding(
            "Every open decoder family of the survey's kind is read.",
            f"all of {', '.join(FAMILIES)}",
            {
                "read": [name for name in FAMILIES if name in read],
                "not read": [name for name in FAMILIES if name not in read],
            },
            "reproduced" if FAMILIES.keys() <= read.keys() else "not reproduced",
        ),
    ]
    if present := [name for name in run["real weights"] if ASSETS[name].paths() is not None]:
        real = {n: run.remember(n, lambda n=n: real_difference(n)) for n in present}
        largest = max(error for row in real.values() for error in row.values())
        findings.append(
            Finding(
                "Real weights too.",
                f"the same bound on a sentence, for those of {', '.join(run['real weights'])} that are installed",
                real,
                "reproduced" if largest <= LARGEST_ERROR else "not reproduced",
            )
        )
    return findings


@torch.no_grad()
def differences(name: str, run: Run) -> dict[str, Any]:
    """Of every configuration of a family, or why it is refused."""
    from seqmix.core.errors import ConfigError

    transformers = require("transformers", extra="train")
    rows: dict[str, Any] = {}
    auto = transformers.AutoModel if name in ENCODERS else transformers.AutoModelForCausalLM
    for kind, fields in {**FAMILIES, **ENCODERS}[name].items():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**fields)
        model = auto.from_config(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.1))
        try:
            rows[kind] = there_and_back(model, torch.randint(3, 101, (2, run["length"])))
        except ConfigError as error:
            return {"refused": str(error)}
    return rows


@torch.no_grad()
def there_and_back(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Largest differences of logits, or of features, relative to the largest."""
    from seqmix.convert.hub import to_seqmix, to_transformers

    wanted = model(ids)[0]
    made = to_seqmix(model)
    found = {"here": made(ids)[0], "back": to_transformers(made)(ids)[0]}
    size = wanted.abs().max()
    return {way: ((logits - wanted).abs().max() / size).item() for way, logits in found.items()}


def real_difference(name: str) -> dict[str, float]:
    """The same for a pretrained model and a sentence."""
    model, tokenizer = load(name)
    text = "The capital of France is Paris, and the capital of Japan is Tokyo."
    return there_and_back(model, tokenizer(text, return_tensors="pt").input_ids)


CLAIM = Claim(
    title="Examining user-friendly and open-sourced large GPT models",
    paper="arXiv:2308.14149",
    claimed="Open decoder families share their blocks, so that one toolbox serves all of them.",
    where="the catalogue's reading of the survey: families to be loaded with equal logits, and back",
    measure=measure,
    quick={"length": 23, "real weights": []},
    full={"length": 50, "real weights": ["smollm2-135m", "gemma3-270m", "minilm"]},
)
