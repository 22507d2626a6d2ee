"""The pages of a folder: reports that `seqmix compare` and others wrote, and records of `seqmix reproduce`.

The folder is listed for every request and a page is looked up in the list by its name, so what a client sends never
becomes a path; a link that leads out of the folder is not in the list.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from seqmix.core.errors import DataError
from seqmix.report import claims, page

LARGEST = 64 << 20  # bytes of a page
CLAIMS = "claims"  # the page of all records


class Reports:
    """The pages of a folder, by their names in it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise DataError(f"reports: there is no folder {folder}.")

    def index(self) -> str:
        """The HTML page that links to all."""
        count = len(self.records())
        links = {name: f"/reports/{quote(name)}" for name in self.pages()}
        if count:
            links = {f"{count} claims of papers": f"/reports/{CLAIMS}"} | links
        parts = [page.links(links)] if links else [page.paragraph("The folder holds none yet.")]
        return page.render_page("Reports", [], lead=[*parts, page.links({"Playground": "/"})])

    def read(self, name: str) -> str | None:
        """The HTML page of this name; None if there is none."""
        if name == CLAIMS and (records := self.records()):
            return claims.render(records)
        path = self.pages().get(name)
        return None if path is None else path.read_text(encoding="utf-8", errors="replace")

    def pages(self) -> dict[str, Path]:
        """The reports."""
        return {str(path.relative_to(self.folder)): path for path in self._files("html")}

    def records(self) -> list[dict[str, Any]]:
        """The records of claims, by their ids; other files are passed over."""
        found = {}
        for path in self._files("json"):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and set(claims.FIELDS) <= set(record):
                found[record["id"]] = record
        return [found[name] for name in sorted(found)]

    def _files(self, kind: str) -> list[Path]:
        return [
            path
            for path in sorted(self.folder.rglob(f"*.{kind}"))
            if path.is_file()
            and path.resolve().is_relative_to(self.folder)
            and path.stat().st_size <= LARGEST
        ]
