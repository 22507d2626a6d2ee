"""Jane Austen's six novels, 4 MB, from the files of an R package, read without R."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from seqmix.core.errors import DataError
from seqmix.data.corpora._asset import CorpusAsset, DebianPackage

# R's serialisation, big-endian: "X\n", three version numbers, then the name of the encoding.
HEADER = struct.Struct(">2s3i")
STRING_VECTOR = 16
STRING = 9


def _strings(record: bytes) -> list[str]:
    """The character vector that one R object holds: flags and length, then the same per string."""
    magic, version, _, _ = HEADER.unpack_from(record)
    (encoding_length,) = struct.unpack_from(">i", record, HEADER.size)
    position = HEADER.size + 4 + encoding_length
    flags, count = struct.unpack_from(">ii", record, position)
    if magic != b"X\n" or version != 3 or flags & 0xFF != STRING_VECTOR:
        raise DataError("austen: the R data file is not a list of strings. Get the package again.")
    position += 8
    lines = []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", record, position)
        if flags & 0xFF != STRING or length < 0:
            raise DataError("austen: the R data file has a missing line. Get the package again.")
        position += 8
        lines.append(record[position : position + length].decode("utf-8"))
        position += length
    return lines


def read(folder: Path) -> list[str]:
    """One document per novel: `Rdata.rdb` is records of a u32 length and a zlib stream."""
    database = (folder / "Rdata.rdb").read_bytes()
    novels = []
    rest = database
    while rest:
        stream = zlib.decompressobj()
        record = stream.decompress(rest[4:])
        rest = stream.unused_data
        novels.append("\n".join(_strings(record)) + "\n")
    return novels


CORPUS = CorpusAsset(
    title="Jane Austen's novels",
    licence="public domain",
    place=DebianPackage(
        package="r-cran-janeaustenr", folder="usr/lib/R/site-library/janeaustenr/data"
    ),
    read=read,
)
