"""Pictures: where they lie, which of them are read, and their pixels when a batch asks for them.

A row keeps its picture as it came, encoded: a file's path, or the bytes of a table's cell. It is
decoded once when rows are read, which shows whether it is whole and gives its digest, and again
for each batch that has it. So memory holds what the files hold, and the numbers of a batch; never
those of a data set.

    digest of a picture    of its pixels, upright and in RGB: copies in other files, of another
                           lossless format or with other metadata, are the same picture

Edge cases
    grey, palette, CMYK       become RGB, as Pillow converts them
    transparency              is dropped, as transformers' own conversion does: not blended
    a phone's rotation        is applied (EXIF's orientation)
    an animation              is its first frame
    16 bits or floats         is left out: Pillow would cut them at 255
    damaged, cut off, too large, of another format, not there: left out, counted by the reason
"""

import base64
import binascii
import hashlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Image as ImageFeature
from datasets import Value
from PIL import Image, ImageOps

from fedlora.errors import DataError
from fedlora.training.data.locate import locate
from fedlora.training.data.tables import Table, column

log = logging.getLogger(__name__)

Picture = bytes | str
"""An encoded picture, or the path of its file."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pillow's names of those that are read. No other decoder of Pillow's is ever called."""
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB",
         "HSV")  # fmt: skip
"""Of at most 8 bits a channel."""
MOST = 89_478_485
"""Pixels of a picture. Pillow warns above that: few bytes may be a picture of any size."""

NONE = "without a picture in it"
ABSENT = "whose picture's file is not there"
DAMAGED = "whose picture is damaged"
DEEP = "whose picture has more than 8 bits a channel"
LARGE = f"whose picture has more than {MOST / 1e6:.0f} million pixels"
SHOWN = 3


class Unreadable(Exception):  # noqa: N818 (a row's fate, which its reader catches)
    """A picture that is left out."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


def opened(picture: Picture) -> Image.Image:
    """The picture, upright and in RGB.

    Raises:
        Unreadable: there is none, or not all of it.
    """
    try:
        content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    except (OSError, ValueError) as e:
        raise Unreadable(ABSENT) from e
    try:
        found = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as e:
        raise Unreadable(LARGE) from e
    except Exception as e:  # whatever a decoder raises on the first bytes of another file
        raise Unreadable(NONE) from e
    if found.width * found.height > MOST:
        raise Unreadable(LARGE)
    if found.mode not in MODES:
        raise Unreadable(DEEP)
    try:
        upright = ImageOps.exif_transpose(found)
        if "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return upright.convert("RGB")
    except Exception as e:  # whatever a decoder raises on the rest
        raise Unreadable(DAMAGED) from e


def digest_of(picture: Image.Image) -> str:
    """Of the pixels, in hexadecimal."""
    size = f"{picture.width}x{picture.height} "
    return hashlib.sha256(size.encode() + picture.tobytes()).hexdigest()


def looked_at(
    pictures: Sequence[Picture], where: str, usual: Callable[[int], str]
) -> tuple[list[str], dict[str, list[int]]]:
    """Each picture's digest, "" of one that is left out; and the numbers of those by the reason.

    usual: where picture i stands, for the log, when it is no file.
    """
    digests, left = list[str](), dict[str, list[int]]()
    for i, picture in enumerate(pictures):
        try:
            digests.append(digest_of(opened(picture)) if picture else "")
        except Unreadable as e:
            digests.append("")
            left.setdefault(e.why, []).append(i)
    for why, numbers in left.items():
        told = [p if isinstance(p := pictures[i], str) else usual(i) for i in numbers[:SHOWN]]
        more = ", ..." if len(numbers) > SHOWN else ""
        text = "%s: %d of %d rows %s are left out: %s%s"
        log.warning(text, where, len(numbers), len(pictures), why, "; ".join(told), more)
    return digests, left


# -- in a table -----------------------------------------------------------------------------------


def pictures_of(table: Table, where: str, key: str, name: str) -> list[Picture]:
    """The pictures of a column, encoded; b"" where a cell is empty.

    Of `datasets`' own images, bytes, structs of bytes and a path, or texts: a path from the table's
    own directory on, or a "data:" URI.

    Raises:
        DataError: there is no such column, or it holds something else.
    """
    feature = table.cells.features.get(name)
    if isinstance(feature, ImageFeature):
        cells = table.cells.cast_column(name, ImageFeature(decode=False))[name][:]
        return [_either(cell or {}, where) for cell in cells]
    if feature is None and f"{name}.bytes" in table.names:
        names = [x for x in ("bytes", "path") if f"{name}.{x}" in table.names]
        columns = [table.cells[f"{name}.{x}"][:] for x in names]
        return [_either(dict(zip(names, cell, strict=True)), where)
                for cell in zip(*columns, strict=True)]  # fmt: skip
    if isinstance(feature, Value) and "binary" in feature.dtype:
        return [cell or b"" for cell in table.cells[name][:]]
    if feature is not None and not (isinstance(feature, Value) and feature.dtype == "string"):
        raise DataError(f'{key} = "{name}": {where} has no pictures there but {feature}')
    return [_written(cell, where) for cell in column(table, where, key, name)]


def as_text(picture: Picture) -> str:
    """The picture as a cell of a text file that `pictures_of` reads, whole."""
    content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    return START + base64.b64encode(content).decode()


START = "data:image/*;base64,"


def _written(cell: str, where: str) -> Picture:
    if not cell.strip():
        return b""
    if not cell.startswith("data:"):
        return str(_beside(where) / cell)
    try:
        return base64.b64decode(cell.partition(",")[2], validate=True) or b"data:"
    except (binascii.Error, ValueError):
        return cell.encode()  # no picture, which is found as the others are


def _either(cell: Mapping[str, Any], where: str) -> Picture:
    """What `datasets` keeps of an image: its bytes, or where they are."""
    content, path = cell.get("bytes"), cell.get("path")
    if content:
        return bytes(content)
    return str(_beside(where) / path) if path else b""


def _beside(where: str) -> Path:
    """The directory that a table's paths begin in; a path from the root on is whole already."""
    place = Path(locate(where))
    return place if place.is_dir() else place.parent
