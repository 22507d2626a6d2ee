"""Adds the reference pages to the documentation while it is built."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from seqmix.cli._pages import pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every generated page becomes a file of the site."""
    for name, text in pages(Path(config.docs_dir) / "claims").items():
        files.append(File.generated(config, name, content=text))
    return files
