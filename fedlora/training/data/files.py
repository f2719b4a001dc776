"""A text file's content: decompressed, decoded, and split into rows by its kind.

Each reader gives columns of texts, exactly as they are written, and the line that each row begins
in. None guesses types: "01" is no number, 1.50 not 1.5, and a date stays as it is.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
}
JSON = (".jsonl", ".json", ".ndjson", ".jsonlines")
IOB = (".conll", ".iob", ".iob2", ".bio")
"""Of files of one word a line: see iob.py."""
TEXTS = (*JSON, ".csv", ".tsv", *IOB)
KINDS = (*TEXTS, ".txt", ".parquet", ".zip")
"""Suffixes of files of rows."""
OTHERS = {
    b"PK\x03\x04": "an Excel sheet or another archive: save it as .csv, or name it .zip",
    b"\xd0\xcf\x11\xe0": "an Excel sheet or another Office file: save it as .csv",
    b"\x1f\x8b": "compressed by gzip: name it .gz",
    b"PAR1": "Parquet: name it .parquet",
    b"ARROW1": "Arrow, or Feather: save it as .parquet",
    b"\xff\xff\xff\xff": "Arrow: name the directory that it is in",
    b"\x80\x04": "a pickle, which is code: save its rows as .jsonl",
    b"\x80\x05": "a pickle, which is code: save its rows as .jsonl",
    b"%PDF": "a PDF: save its rows as .csv or .jsonl",
    b"SQLite format 3": "a database: export the table as .csv",
}
"""How files begin that are no text, and what they are."""
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte-order marks; a longer one before one that it begins with."""
ONE_BYTE = ("latin-1", "latin1", "iso-8859-1", "iso-8859-15", "cp1252", "windows-1252")
"""Encodings of one byte a letter, in which any file decodes."""
LATER_MARK = re.compile("(^|[\r\n])\ufeff+")
"""A byte-order mark at the beginning of a line: where files were put together."""


def unpacked(place: Path) -> tuple[str, bytes]:
    """The kind of a file by its suffix, ".csv", and its bytes: of the one file in a .zip.

    Raises:
        ValueError: it is damaged, or an archive of several files.
        OSError: it cannot be read.
    """
    suffix, content = place.suffix.lower(), place.read_bytes()
    if suffix == ".zip":
        return _of_zip(content)
    if suffix not in COMPRESSED:
        return suffix, content
    with _damage():
        return kind_of(place), COMPRESSED[suffix](content)


def kind_of(place: Path) -> str:
    """The kind of a file by its suffix, without reading it; ".zip" of an archive."""
    suffix = place.suffix.lower()
    return Path(place.stem).suffix.lower() if suffix in COMPRESSED else suffix


BROKEN = (zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@contextmanager
def _damage() -> Iterator[None]:
    """Whatever says that an archive is damaged, as a ValueError."""
    try:
        yield
    except (OSError, ValueError, EOFError, RuntimeError, *BROKEN) as e:
        raise ValueError(f"the archive is damaged, or locked: {e}") from None


def _of_zip(content: bytes) -> tuple[str, bytes]:
    with _damage(), zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [n for n in archive.namelist() if _is_rows(n)]
        found = [archive.read(name) for name in names[:1]]
    if len(names) != 1:
        raise ValueError(
            f"the archive holds {len(names)} files ({', '.join(names[:5])}), must be one: unpack it"
        )
    return Path(names[0]).suffix.lower(), found[0]


def _is_rows(name: str) -> bool:
    """Is it no directory, and nothing that a Mac's Finder put there?"""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not name.endswith("/") and not hidden


def decoded(content: bytes, encoding: str) -> tuple[str, str]:
    """A file's text without its byte-order marks, and its encoding: by its mark, else as given.

    Raises:
        ValueError: a byte is not of that encoding; says in which line.
        LookupError: there is no such encoding.
    """
    for start, what in OTHERS.items():
        if content.startswith(start):
            raise ValueError(f"it is no text but {what}")
    found = next((name for mark, name in MARKS.items() if content.startswith(mark)), encoding)
    if found.lower().replace("_", "-") in ONE_BYTE and _is_utf_8(content):
        raise ValueError(
            f"data.encoding is {found}, and the whole file is UTF-8 with letters of several bytes: "
            'set data.encoding = "utf-8"'
        )
    if found.lower().startswith("utf-8") and b"\0" in content[:1000]:
        raise ValueError(f"it is not {found}: set data.encoding (utf-16-le or utf-16-be?)")
    try:
        text = content.decode(found)
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise ValueError(
            f"line {line}: byte {content[e.start]:#04x} is not "
            f"{found}; set data.encoding (Windows and older Excel write cp1252, others latin-1)"
        ) from None
    if "\0" in text[:1000]:
        raise ValueError(f"it is not {found}: set data.encoding (utf-16-le or utf-16-be?)")
    return LATER_MARK.sub(r"\1", text), found


def _is_utf_8(content: bytes) -> bool:
    """Is it UTF-8, and more than ASCII? A text of another encoding is so by no chance."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not content.isascii()


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1. Line ends of every system count."""
    with io.StringIO(text, newline=None) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.removesuffix("\n")


def matched(
    text: str, pattern: re.Pattern[str]
) -> tuple[dict[str, list[str | None]], list[int], list[tuple[int, str]]]:
    """The named groups of the lines that match, as columns; their lines; and the other lines."""
    found: list[tuple[int, dict[str, str | None]]] = []
    others: list[tuple[int, str]] = []
    for number, line in lines_of(text):
        if match := pattern.match(line):
            found.append((number, match.groupdict()))
        else:
            others.append((number, line))
    columns = {name: [groups[name] for _, groups in found] for name in pattern.groupindex}
    return columns, [number for number, _ in found], others
