"""A pretrained model to a cheaper one: by a recipe, or by a search for the recipes that a budget allows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqmix.compress import parse_recipe, write_recipe
from seqmix.core.errors import ConfigError
from seqmix.core.files import write_text
from seqmix.data.text import Corpus
from seqmix.measure.footprint import footprints
from seqmix.measure.machine import describe
from seqmix.models.pretrained import load, quiet
from seqmix.report import compression
from seqmix.search._workbench import Made, Settings, Workbench
from seqmix.search.frontier import Trials, find_frontier, parse_limits
from seqmix.train.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True, eq=False)
class Compressed:
    """A cheaper model and how it came about.

    `steps` has an entry for the original and for the model after each step: recipe, figures (quality and footprint),
    relative (the same as shares of the original's), notes, seconds. `frontier` is what a search for a budget found.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    recipe: str
    steps: list[dict[str, Any]]
    needs: list[dict[str, Any]]
    frontier: dict[str, Any] | None = None

    @property
    def report(self) -> Path:
        """The HTML page with all of this."""
        return self.folder / REPORT

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model and the tokeniser, as plain values."""
        names = ("recipe", "steps", "needs", "frontier")
        return {name: getattr(self, name) for name in names}


def compress(
    model: PreTrainedModel | str | Path,
    data: str | Path | Corpus,
    *,
    recipe: str | None = None,
    budget: str | None = None,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 256,
    windows: int = 64,
    evaluation_tokens: int = 8192,
    questions: int = 16,
    passkey_length: int | None = 256,
    context: int = 512,
    trials: int = 16,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Compressed:
    """Makes a language model cheaper, and measures what it cost and saved.

    Args:
        model: a folder, a hub name, an asset or a model of a family that `seqmix.convert.hub` reads, or one of this
            package. It is never changed.
        data: text that transforms may look at (nine tenths), and on which quality is measured (the rest).
        recipe: transforms joined by `|`, such as `finercut:0.25 | slice:0.2 | int8`.
        budget: instead of a recipe: limits such as `latency<0.6x, loss<1.05x`, x for times the original's. The best
            of `trials` recipes is kept, and all are reported; `seqmix.search.frontier` says what is tried.
        out: folder for the checkpoint, which `from_pretrained` loads, report.html and result.json. The same call
            resumes a stopped run.
        length, windows: of the calibration text; evaluation_tokens, questions, passkey_length: of the held-out
            measurements (0 questions or no length leave them out); context: tokens at which speeds are measured.

    Returns:
        The model and the figures after every step.

    Raises:
        ConfigError, UnknownName, BudgetError: for a recipe or budget that does not parse or cannot be applied.
        DataError, CheckpointError, OutputError: for unusable data, model or folder.
    """
    if (recipe is None) == (budget is None):
        raise ConfigError("Give either a recipe or a budget.")
    transforms = parse_recipe(recipe) if recipe is not None else []
    limits = parse_limits(budget)
    settings = Settings(
        length=length,
        windows=windows,
        evaluation_tokens=evaluation_tokens,
        questions=questions,
        passkey_length=passkey_length,
        context=context,
    )
    arguments = {
        "model": _name(model),
        "data": data.name if isinstance(data, Corpus) else str(data),
        "recipe": write_recipe(transforms),
        "budget": ", ".join(map(str, limits)),
        "seed": seed,
        **({"trials": trials} if limits else {}),
        **dataclasses.asdict(settings),
    }
    folder = RunFolder(out, arguments, resume=resume)
    if (result := folder.result()) is not None:
        with quiet():
            done, words = load(folder.path)
        assert words is not None
        kept = {name: result[name] for name in ("recipe", "steps", "needs", "frontier")}
        return Compressed(model=done, tokenizer=words, folder=folder.path, **kept)

    bench = Workbench(
        model,
        data,
        settings,
        folder.checkpoints,
        tokenizer=tokenizer,
        say=say,
        shown=progress,
    )
    frontier = None
    if limits:
        found: Trials = find_frontier(bench, limits, trials=trials, seed=seed)
        transforms, frontier = parse_recipe(found.chosen), found.to_dict()
    needs = bench.needs(transforms)
    for row in needs:
        say(
            f"{row['step']}: about {row['seconds']:.0f} s here ({row['forward_tokens']:,} tokens read, "
            f"{row['training_tokens']:,} trained on), {row['memory_mb']:.0f} MiB beside the model"
        )
    made = [bench.make(transforms[:count]) for count in range(len(transforms) + 1)]
    steps = measured(made, context=context)
    record = {
        "recipe": write_recipe(transforms),
        "steps": steps,
        "needs": needs,
        "frontier": frontier,
        "arguments": arguments,
        "data": {"name": bench.corpus.name, "fingerprint": bench.corpus.fingerprint},
        "machine": describe(),
    }
    write_text(folder.path / REPORT, compression.render(record))
    with quiet():
        folder.finish(made[-1].model, bench.tokenizer, json.loads(json.dumps(record)))
    kept = {name: record[name] for name in ("recipe", "steps", "needs", "frontier")}
    return Compressed(model=made[-1].model, tokenizer=bench.tokenizer, folder=folder.path, **kept)


def convert(
    model: PreTrainedModel | str | Path,
    data: str | Path | Corpus,
    *,
    to: str,
    out: str | Path,
    keep_attention: float = 0.25,
    transfer_tokens: int = 16384,
    recover_tokens: int = 16384,
    **options: Any,
) -> Compressed:
    """Puts other mixers in the place of attention: `linearize` and then `recover`, as a recipe of `compress`.

    Args:
        to: a causal mixer of this package, such as `liger`.
        keep_attention: the share of the layers that stay attention, those whose loss would hurt most.
        transfer_tokens: with which each new mixer learns what the attention before it did.
        recover_tokens: of training afterwards; 0 for none.
        options: of `compress`, but recipe and budget.
    """
    if {"recipe", "budget"} & options.keys():
        raise ConfigError("convert: the recipe follows from `to`. Use seqmix.compress for others.")
    recipe = f"linearize(to={to}, keep={keep_attention}, transfer_tokens={transfer_tokens})"
    if recover_tokens:
        recipe += f" | recover(tokens={recover_tokens})"
    return compress(model, data, recipe=recipe, out=out, **options)


def measured(made: Sequence[Made], *, context: int) -> list[dict[str, Any]]:
    """The steps with all their figures; speeds are taken in turn, so that they compare."""
    sizes = footprints({str(i): m.model.model for i, m in enumerate(made)}, context=context)
    steps: list[dict[str, Any]] = []
    for number, one in enumerate(made):
        figures = {**one.record["quality"], **sizes[str(number)]}
        first = steps[0]["figures"] if steps else figures
        steps.append({**one.record, "figures": figures, "relative": relative(figures, first)})
        del steps[-1]["quality"]
    return steps


def relative(figures: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, float]:
    """Every number as a share of the original's."""
    return {
        name: value / original[name]
        for name, value in figures.items()
        if isinstance(value, int | float) and original.get(name)
    }


def _name(model: Any) -> Any:
    if isinstance(model, str | Path):
        return str(Path(model).resolve()) if Path(model).is_dir() else str(model)
    return {"class": type(model).__name__, "parameters": model.num_parameters()}
