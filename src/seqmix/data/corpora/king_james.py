"""The King James Bible: 66 books, one verse per line, from a SWORD module."""

from __future__ import annotations

import html
import re
import struct
import zlib
from pathlib import Path

from seqmix.data.corpora._asset import CorpusAsset, DebianPackage

BLOCK = struct.Struct("<III")  # offset, compressed size, size
VERSE = struct.Struct("<IIH")  # block, offset in the block, size
NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
TITLE_END = re.compile(r"</title>|<chapter\b[^>]*/>")
TAG = re.compile(r"<[^>]*>")


def _plain(verse: str) -> str:
    """Markup and footnotes removed; a heading gets a line of its own."""
    text = html.unescape(TAG.sub("", TITLE_END.sub("\n", NOTE.sub("", verse))))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def read(folder: Path) -> list[str]:
    """One document per book.

    A testament is an index of verses, an index of blocks, and zlib blocks, one per book.
    """
    books = []
    for testament in ("ot", "nt"):
        blocks = (folder / f"{testament}.bzs").read_bytes()
        packed = (folder / f"{testament}.bzz").read_bytes()
        texts = [
            zlib.decompress(packed[offset : offset + size])
            for offset, size, _ in BLOCK.iter_unpack(blocks)
        ]
        verses: list[list[str]] = [[] for _ in texts]
        for block, offset, size in VERSE.iter_unpack((folder / f"{testament}.bzv").read_bytes()):
            if size and (plain := _plain(texts[block][offset : offset + size].decode("utf-8"))):
                verses[block].append(plain)
        books += ["\n".join(lines) + "\n" for lines in verses if lines]
    return books


CORPUS = CorpusAsset(
    title="The King James Bible",
    licence="public domain (Crown copyright in the United Kingdom)",
    place=DebianPackage(
        package="sword-text-kjv", folder="usr/share/sword/modules/texts/ztext/engKJV2006eb"
    ),
    read=read,
)
