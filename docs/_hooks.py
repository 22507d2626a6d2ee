"""Adds the reference pages to the documentation while it is built, and sets their equations."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from seqmix.cli._pages import pages

EQUATION = re.compile(r"^```latex\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every generated page becomes a file of the site."""
    for name, text in pages(Path(config.docs_dir)).items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """LaTeX as MathML, which browsers show by themselves: the site fetches nothing from elsewhere."""
    return EQUATION.sub(lambda found: f"<div>{convert(found[1], display='block')}</div>", markdown)
