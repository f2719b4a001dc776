"""Whose rows a charge is for: the units of a training set, by digests that only the node can make.

    unit        a row as read, all its columns; or the value of data.unit-column: a person
    kept        HMAC-SHA256 of each unit under the ledger's own key, 16 bytes, sorted
    <directory>/<sha256>.bin     one file for each distinct set

What a run makes of a row (its text column, data.map, a label's name, the order, a limit) is not in
the unit, nor how its cells are written: training/data/row_units.py.

Edge cases
    a set that is gone or damaged      it may be of any units: it meets every other
    two units of one digest            they are one: more is charged, never less
    sets of two readings               they meet: their units cannot be compared
"""

import functools
import hashlib
import hmac
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora.config.sections import DataConfig
from fedlora.lora.tree_file import write_atomically
from fedlora.training.data.row_units import FORM, FORM_OF_VALUES, SIZE
from fedlora.training.data.rows import Rows

ALL = "*"
"""In place of a set: any units."""
Set = NDArray[np.bytes_]
"""Sorted digests of distinct units."""


@dataclass(frozen=True, slots=True)
class Units:
    """A training set's units, not yet under a ledger's key."""

    reading: str
    """Names what a unit is, and how rows are cut into cells: other readings give other units."""
    digests: frozenset[bytes]
    most: int
    """The most rows of one unit; 1 where each row is its own."""

    @classmethod
    def of(cls, rows: Rows, data: DataConfig) -> "Units | None":
        """Of training rows that were read under this config; None where they were read without."""
        if len(rows.unit) != len(rows):
            return None
        by_pixels = bool(rows.picture) and not data.unit_column
        sites = [(x.separator, x.encoding) for x in data.clients]
        how = data.unit_column, data.separator, data.encoding, data.line_pattern
        form = FORM_OF_VALUES if data.unit_column else FORM
        cut = form, by_pixels, *how, *(sites if any(map(any, sites)) else ())
        reading = hashlib.sha256(repr(cut).encode()).hexdigest()[:16]
        most = max(Counter(rows.unit).values(), default=1) if data.unit_column else 1
        return cls(reading, frozenset(rows.unit), most)

    def keyed(self, key: bytes) -> Set:
        """The digests that are kept of them."""
        found = {hmac.digest(key, x, "sha256")[:SIZE] for x in self.digests}
        return np.frombuffer(b"".join(sorted(found)), f"S{SIZE}")


def save(directory: Path, units: Set) -> str:
    """Keep a set; its name. It is on disk when this returns."""
    data = units.tobytes()
    name = hashlib.sha256(data).hexdigest()
    path = directory / f"{name}.bin"
    if not path.exists() or path.stat().st_size != len(data):
        write_atomically(path, data)
    return name


def load(directory: Path, name: str) -> Set | None:
    """A set that was kept; None where it is gone or no longer what its name says."""
    try:
        data = (directory / f"{name}.bin").read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != name or len(data) % SIZE:
        return None
    return np.frombuffer(data, f"S{SIZE}")


@functools.lru_cache(maxsize=2**16)
def _known_to_meet(directory: Path, one: str, other: str) -> bool:
    a, b = load(directory, one), load(directory, other)
    return a is None or b is None or bool(np.intersect1d(a, b, assume_unique=True).size)


def meet(directory: Path, one: str, other: str) -> bool:
    """Have two sets of one reading a unit in common? Where that cannot be told, they have."""
    if ALL in (one, other) or one == other:
        return True
    return _known_to_meet(directory, *sorted((one, other)))
