"""Which files of a directory are its rows."""

import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from fedlora.errors import DataError
from fedlora.training.data.files import KINDS, TEXTS, kind_of
from fedlora.training.data.picture_folder import has_pictures

log = logging.getLogger(__name__)


def is_of_pictures(place: Path) -> bool:
    """Are a directory's rows the pictures in its folders, and no tables?"""
    tables = place.is_dir() and any(kind_of(p) in KINDS for p in place.iterdir())
    return place.is_dir() and not tables and has_pictures(place)


def of_split(place: Path, split: str) -> Path | None:
    """The one text file of a directory that is named for the split, "train.csv"; else none.

    Raises:
        DataError: several are.
    """
    found = sorted(p for p in place.glob(f"{glob.escape(split)}.*") if kind_of(p) in TEXTS)
    if len(found) > 1:
        names = " and ".join(p.name for p in found)
        raise DataError(f'"{place}" holds {names}: name the file itself, or leave one')
    return found[0] if found else None


OTHER_SPLITS = re.compile(r"(train|test|valid|validation|val|dev|eval)([-._]\d.*)?\.")


def say_unread(place: Path, files: Sequence[Path]) -> None:
    """Log the tables of a directory that are none of the files that are read.

    Raises:
        DataError: they are as many as those.
    """
    known = {f.resolve() for f in files}
    kinds = (*TEXTS, ".parquet")
    others = sorted(
        p.name
        for p in place.iterdir()
        if kind_of(p) in kinds and kind_of(p) != ".json" and p.resolve() not in known
        if not OTHER_SPLITS.match(p.name)
    )
    if others and len(others) >= len(known) and not any(OTHER_SPLITS.match(f.name) for f in files):
        names = " and ".join([files[0].name, *others[:5]]) if files else ", ".join(others[:5])
        raise DataError(f'"{place}" holds {names}, of which one kind would be read: name the file')
    if others:
        log.warning("%s: %s: not read, in no split of it", place, ", ".join(others[:8]))
