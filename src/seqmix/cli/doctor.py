"""Say what this installation has, and what each missing thing would bring."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import warnings
from typing import Any

from seqmix.cli._describe import catalog, summary
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
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def run(json: Json = False) -> None:
    """Show machine, versions, optional packages and assets; for what is missing, how to get it.

    Example: `seqmix doctor`
    """
    record: dict[str, Any] = {
        "machine": _machine(),
        "packages": _packages(),
        "assets": _assets(),
        "browser": next(filter(None, map(shutil.which, BROWSERS)), None),
        "native_kernels": _native_kernels(),
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
    kernels = record["native_kernels"]
    rows = [[name, _words(value)] for name, value in kernels.items() if name != "get"]
    print_table(["\nnative kernels", "\n"], rows)
    if kernels["get"]:
        print_text(f"\n{kernels['get']}")


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


def _native_kernels() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says it in full
        from seqmix.kernels import describe

    return describe()


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return {None: "none", True: "yes", False: "no"}.get(value, str(value))


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
    from seqmix.models.pretrained import ASSETS

    corpora = catalog("corpora")
    entries = []
    for name in corpora:
        place = corpora.get(name).place
        folder = place.find()
        entries.append(
            {
                "name": name,
                "found": None if folder is None else str(folder),
                "brings": f"corpus: {summary(corpora, name)}",
                "get": "" if folder else place.how_to_get(),
            }
        )
    for name, asset in ASSETS.items():
        paths = asset.paths()
        found = None if paths is None else str(paths[0].parent)
        get = "" if found else asset.install
        entries.append({"name": name, "found": found, "brings": "model", "get": get})
    return entries
