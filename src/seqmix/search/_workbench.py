"""Steps of recipes on disk, and what is measured of the models that they give.

FOLDER/KEY/                the model after a recipe, KEY from the recipe; complete or not there at all
FOLDER/KEY/step.json       the recipe, its notes and seconds, the model's quality
FOLDER/.KEY/               what a step remembers, so that it goes on after a stop; KEY without the amount where what is
                           remembered holds for every amount
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seqmix.compress import Calibration, Needs, Transform, Work, write_recipe
from seqmix.convert.hub import to_seqmix
from seqmix.core.errors import ConfigError
from seqmix.core.files import new_folder
from seqmix.data.text import Corpus, read_text, split_text
from seqmix.data.tokenizer import encode
from seqmix.measure.quality import quality
from seqmix.models.hf import SeqmixForCausalLM
from seqmix.models.pretrained import load_language_model, quiet
from seqmix.train.evaluation import HeldOut, backend_of, end_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALIBRATION_SHARE = 0.9  # of the text; the rest is held out
STEP = "step.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and on how much text."""

    length: int = 256  # tokens per window
    windows: int = 64  # that transforms may look at
    evaluation_tokens: int = 8192
    questions: int = 16  # zero-shot, of each kind
    passkey_length: int | None = 256
    context: int = 512  # tokens of the text at which speeds are measured


@dataclass(frozen=True, eq=False)
class Made:
    """A model, the step that made it and its quality."""

    model: SeqmixForCausalLM
    record: dict[str, Any]


class Workbench:
    """The original model, the text in two parts, and a folder for what is made of it."""

    def __init__(
        self,
        model: Any,
        data: str | Path | Corpus,
        settings: Settings,
        folder: Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        say: Callable[[str], None],
        shown: bool,
    ) -> None:
        self.settings, self.folder, self.say, self.shown = settings, folder, say, shown
        corpus = data if isinstance(data, Corpus) else read_text(data)
        self.corpus = corpus
        with quiet():
            if isinstance(model, str | Path):
                model, own = load_language_model(model)
                tokenizer = tokenizer or own
            if tokenizer is None:
                raise ConfigError("The model comes without a tokenizer. Give one as `tokenizer`.")
            self.original = to_seqmix(model).eval()
        self.tokenizer = tokenizer
        calibration, held_out = split_text(corpus, CALIBRATION_SHARE)
        self.calibration = Calibration.of(
            calibration,
            tokenizer,
            length=settings.length,
            windows=settings.windows,
            teacher=self.original,
        )
        backend = backend_of(tokenizer)
        self._held_out = HeldOut(
            encode(backend, held_out.documents),
            held_out.documents,
            backend,
            settings.length,
            end_of_text(tokenizer),
            limit=settings.evaluation_tokens,
        )
        self._passages = "\n".join(held_out.documents)

    def measured(self, model: SeqmixForCausalLM) -> dict[str, Any]:
        """Quality on the held-out text."""
        return quality(
            model,
            self.tokenizer,
            self._held_out,
            self._passages,
            questions=self.settings.questions,
            passkey_length=self.settings.passkey_length,
        )

    def needs(self, recipe: Sequence[Transform]) -> list[dict[str, Any]]:
        """What each step will take, the time from the speed of the original here."""
        window = self.calibration.windows[:1]
        with torch.inference_mode():
            self.original(window, use_cache=False)
            start = time.perf_counter()
            self.original(window, use_cache=False)
        per_token = (time.perf_counter() - start) / window.numel()
        rows = []
        for transform in recipe:
            needs: Needs = transform.needs(self.original, self.calibration)
            passes = needs.forward_tokens + 3 * needs.training_tokens  # a backward pass costs two
            rows.append(
                {
                    "step": write_recipe([transform]),
                    "forward_tokens": needs.forward_tokens,
                    "training_tokens": needs.training_tokens,
                    "seconds": passes * per_token,
                    "memory_mb": needs.memory_mb,
                }
            )
        return rows

    def make(self, recipe: Sequence[Transform]) -> Made:
        """The model after these steps; those that are on disk already are read."""
        written = write_recipe(recipe)
        place = self.folder / (_key(recipe) if recipe else "original")
        if (place / STEP).is_file():
            record = json.loads((place / STEP).read_text(encoding="utf-8"))
            model = self.original
            if recipe:
                with quiet():
                    model = SeqmixForCausalLM.from_pretrained(place).eval()
            return Made(model, record)
        if not recipe:
            return self._keep(place, self.original, {"recipe": "", "notes": {}, "seconds": 0.0})
        *first, last = recipe
        memory = self.folder / f".{_key([*first, last.whatever_amount])}"
        work = Work(folder=memory, shown=self.shown)
        before = self.make(first)
        self.say(f"{written}: {last.name} ...")
        start = time.perf_counter()
        model = last.fit(before.model, self.calibration, work).eval()
        seconds = time.perf_counter() - start
        made = self._keep(
            place, model, {"recipe": written, "notes": work.notes, "seconds": seconds}
        )
        if last.amount is None:
            shutil.rmtree(memory, ignore_errors=True)
        return made

    def _keep(self, place: Path, model: SeqmixForCausalLM, record: dict[str, Any]) -> Made:
        record = record | {"quality": self.measured(model)}
        with new_folder(place) as temporary, quiet():
            if record["recipe"]:  # the original is where it was
                model.save_pretrained(temporary)
            (temporary / STEP).write_text(json.dumps(record), encoding="utf-8")
        return Made(model, record)


def _key(recipe: Sequence[Transform]) -> str:
    return hashlib.sha256(write_recipe(recipe).encode()).hexdigest()[:12]
