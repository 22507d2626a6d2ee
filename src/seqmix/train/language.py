"""Training of language models on text."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from seqmix.core.errors import ConfigError
from seqmix.data.packing import Packed, pack
from seqmix.data.text import Corpus, read_text, split_text
from seqmix.data.tokenizer import encode, save_tokenizer, tokenizer_from
from seqmix.models.backbone import ModelSpec
from seqmix.models.hf import SeqmixForCausalLM, create
from seqmix.models.pretrained import load_language_model, quiet
from seqmix.ops import record_forms
from seqmix.train.evaluation import HeldOut, backend_of, end_of_text, takes_segments
from seqmix.train.folder import RunFolder
from seqmix.train.loop import run
from seqmix.train.parameters import merged, select_parameters
from seqmix.train.plan import Plan, Record
from seqmix.train.result import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING_SHARE = 0.9  # of a text; the rest is for evaluation


def train(
    model: str | Path | ModelSpec | PreTrainedModel,
    data: str | Path | Corpus,
    *,
    out: str | Path | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    length: int = 256,
    batch: int = 8,
    learning_rate: float = 3e-3,
    schedule: str = "cosine",
    warmup: float = 0.05,
    weight_decay: float = 0.1,
    seed: int = 0,
    precision: str = "float32",
    accumulate: int = 1,
    parameters: str | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase = "bytes",
    evaluate_every: int | None = None,
    evaluation_tokens: int | None = 2**17,
    save_every: int | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Trained:
    """Trains a language model on nine tenths of `data`, and evaluates it on the rest.

    Args:
        model: a layout such as `3x[mamba2], attention`, a `ModelSpec` (its vocabulary is set to that of the
            tokeniser), a folder or a model to go on from.
        data: a file, a folder, a corpus name or a `Corpus`.
        out: folder for checkpoints and the result. The same call resumes an interrupted run exactly.
        steps, tokens, seconds: the budget, exactly one of them. Seconds leave out start-up, saving and
            evaluating, and count what a resumed run has used before.
        length, batch, accumulate: tokens per row, rows per batch, batches per optimiser step.
        learning_rate: its peak; `schedule` is `cosine` or `warmup_stable_decay`, `warmup` a share of the run.
        weight_decay: of matrices; AdamW with betas (0.9, 0.95), gradients clipped at norm 1.
        seed: of a new model's weights and of the order of the data.
        precision: `float32`, or `bfloat16` for autocast.
        parameters: which are trained: `all`, `head`, `last`, `lora` or `prefix` (`seqmix.train.parameters`); by
            default those of the model that require gradients. A low rank is merged into the weights at the end.
        tokenizer: of a new model: `bytes`, `bpe:4096` or a folder. A model to go on from keeps its own; for
            a model object, give its tokeniser.
        evaluate_every: steps between evaluations, which join the history as `validation_loss`.
        evaluation_tokens: of the held-out text, about so many are scored, evenly spread; None for all.
        save_every: steps between checkpoints; one per minute by default.

    Raises:
        ConfigError, DataError, OutputError: for arguments that cannot be used.
        CheckpointError: where `out` holds a run with other arguments, or a damaged one.
        NumericalError: for a loss that is not finite; its attribute `step` is the step.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    if sum(budget is not None for budget in (steps, tokens, seconds)) != 1:
        raise ConfigError("Give exactly one budget: steps, tokens or seconds.")
    for name, value in (("batch", batch), ("tokens", tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}, wanted at least 1.")
    if parameters == "prefix" and out is not None:
        raise ConfigError(
            "parameters='prefix' goes without `out`: a prefix is no part of a model's weights. Train without it, and "
            "save with result.model.save_pretrained."
        )
    tokens_per_step = batch * length * accumulate
    corpus = data if isinstance(data, Corpus) else read_text(data)
    plan = Plan(
        steps=-(-tokens // tokens_per_step) if tokens is not None else steps,
        seconds=seconds,
        tokens_per_step=tokens_per_step,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        accumulate=accumulate,
        precision=precision,
        seed=seed,
        save_every=save_every,
        observe_every=evaluate_every,
        progress=progress,
    )
    training, held_out = split_text(corpus, TRAINING_SHARE)
    with quiet():
        made, words = prepare(model, tokenizer, training, seed=seed)
    if parameters is not None:
        made = select_parameters(made, parameters, seed=seed)
    backend, eos = backend_of(words), end_of_text(words)
    packed = pack(encode(backend, training.documents), length, eos=eos)
    rest = HeldOut(
        encode(backend, held_out.documents),
        held_out.documents,
        backend,
        length,
        eos,
        limit=evaluation_tokens,
    )

    folder = None
    if out is not None:
        ignored = ("save_every", "progress")
        settings = {k: v for k, v in dataclasses.asdict(plan).items() if k not in ignored}
        described = {
            "model": describe(model),
            "data": corpus.fingerprint,
            "tokenizer": str(tokenizer),
            "parameters": parameters,
        }
        if not isinstance(tokenizer, str | Path):
            described["tokenizer"] = type(tokenizer).__name__
        folder = RunFolder(
            out, described | {"length": length, "batch": batch} | settings, resume=resume
        )
        if (result := folder.result()) is not None:
            return finished(folder, result)

    def observe(record: Record) -> dict[str, float]:
        return {"validation_loss": rest.evaluate(made)["loss"]}

    with record_forms() as forms:
        record = run(
            made,
            shuffled(packed, batch, seed=seed, keep_segments=takes_segments(made)),
            plan,
            folder=folder,
            observe=observe,
        )
    if parameters == "lora":
        made = merged(made)
    trained = Trained(
        model=made,
        tokenizer=words,
        folder=folder.path if folder else None,
        history=record.history,
        evaluation=rest.evaluate(made, progress=progress),
        steps=record.steps,
        tokens=record.tokens,
        seconds=record.seconds,
        tokens_per_second=record.tokens_per_second,
        forms=sorted(forms),
    )
    if folder:
        with quiet():
            folder.finish(made, words, trained.record())
    return trained


def prepare(
    model: str | Path | ModelSpec | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    corpus: Corpus,
    *,
    seed: int,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokeniser."""
    if isinstance(model, nn.Module) or is_saved(model):
        words = None
        if not isinstance(model, nn.Module):
            model, words = load_language_model(model)
        if words is None:
            if isinstance(tokenizer, str | Path):
                words = _tokenizer(tokenizer, corpus)
            else:
                words = tokenizer
        if len(words) > model.config.vocab_size:
            raise ConfigError(
                f"The tokeniser has {len(words)} ids and the model only {model.config.vocab_size}. "
                "Give the tokeniser that belongs to the model."
            )
        return model, words
    words = _tokenizer(tokenizer, corpus) if isinstance(tokenizer, str | Path) else tokenizer
    spec = dataclasses.replace(to_spec(model), vocabulary=len(words))
    return new_model(spec, seed, eos=words.eos_token_id, pad=words.pad_token_id), words


def to_spec(model: str | Path | ModelSpec) -> ModelSpec:
    """A layout or specification as a specification."""
    return model if isinstance(model, ModelSpec) else ModelSpec.from_dict({"layout": str(model)})


def new_model(
    spec: ModelSpec, seed: int, *, eos: int | None = None, pad: int | None = None
) -> SeqmixForCausalLM:
    """A model whose weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(spec, eos_token_id=eos, pad_token_id=pad)


def is_saved(model: Any) -> TypeGuard[str | Path]:
    """Whether `model` names a saved model, not a layout."""
    return isinstance(model, Path) or (isinstance(model, str) and Path(model).is_dir())


def describe(model: str | Path | ModelSpec | PreTrainedModel) -> Any:
    """What stands for the model in the arguments of a run."""
    if isinstance(model, nn.Module):
        return {"class": type(model).__name__, "parameters": model.num_parameters()}
    return str(Path(model).resolve()) if is_saved(model) else to_spec(model).to_dict()


def finished(folder: RunFolder, result: dict[str, Any]) -> Trained:
    """The result of a run that is complete."""
    with quiet():
        model, tokenizer = load_language_model(folder.path)
    forms = [(operator, form) for operator, form in result.pop("forms")]
    return Trained(model=model, tokenizer=tokenizer, folder=folder.path, forms=forms, **result)


def shuffled(packed: Packed, batch: int, *, seed: int, keep_segments: bool) -> Any:
    """Batch i of the windows in an order that changes with every pass over them."""
    windows = packed.windows
    order: dict[int, np.ndarray] = {}

    def place(index: int) -> int:
        turn, offset = divmod(index, windows)
        if turn not in order:
            if len(order) > 1:
                order.clear()
            order[turn] = np.random.default_rng([seed, turn]).permutation(windows)
        return int(order[turn][offset])

    def draw(index: int) -> dict[str, Tensor]:
        rows = packed.batch([place(index * batch + row) for row in range(batch)])
        return rows if keep_segments else {k: v for k, v in rows.items() if k != "segments"}

    return draw


def _tokenizer(tokenizer: str | Path, corpus: Corpus) -> PreTrainedTokenizerBase:
    if Path(tokenizer).is_dir():
        return AutoTokenizer.from_pretrained(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer_from(tokenizer, corpus), folder)
        return AutoTokenizer.from_pretrained(folder)
