"""Adds the reference pages to the documentation while it is built."""

from pathlib import Path

from mkdocs.structure.files import File

from seqmix.cli._pages import pages


def on_files(files, config):
    """Every generated page becomes a file of the site."""
    for name, text in pages(Path(config.docs_dir) / "claims").items():
        files.append(File.generated(config, name, content=text))
    return files
