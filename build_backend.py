"""scikit-build-core, but an editable installation is a plain path to src/.

Its own import hook knows the files that were there at installation and goes before PYTHONPATH. Our folders are
registries, where a new file must count at once, and whoever works in several worktrees chooses one by PYTHONPATH.
"""

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from scikit_build_core import build as _scikit_build
from scikit_build_core.build import (
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    """The kernels into src/seqmix/kernels (CMakeLists.txt does so), and a wheel that holds the path of src/."""
    name = _scikit_build.build_editable(wheel_directory, config_settings, metadata_directory)
    path = Path(wheel_directory, name)
    with zipfile.ZipFile(path) as wheel:
        files = {entry: wheel.read(entry) for entry in wheel.namelist()}
    record = next(entry for entry in files if entry.endswith(".dist-info/RECORD"))
    kept = {
        entry: data for entry, data in files.items() if ".dist-info/" in entry and entry != record
    }
    kept["seqmix.pth"] = f"{Path('src').resolve()}\n".encode()
    lines = [f"{entry},{_digest(data)},{len(data)}\n" for entry, data in kept.items()]
    kept[record] = "".join([*lines, f"{record},,\n"]).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for entry, data in kept.items():
            wheel.writestr(entry, data)
    return name


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
