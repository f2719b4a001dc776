"""The format number of a tree file, and how the names in an older format map to today's.

The names of classes and fields in a tree are on disk, so they are a format, and it has a number,
which stands before the tree in the file's metadata: {"format": 3, "digest": ..., "tree": ...}.

    1    the tree alone, without a number: everything up to version 0.1.0
    2    the number; `Saved.origin` is `Saved.base_offset`, and `Saved.finished` is gone
    3    the digest of the file: lora/tree_digest.py

When a name on disk changes, FORMAT goes up by one, and who owns the class says in a `Names` what
the last format called it (`OLDER` in federation/server/journal.py). Such a map is never changed
again: a file of format n goes through those of n, n + 1, ... to today's. A field that is new has a
default, and a file that lacks it takes that. What no map names, and no class has, is refused by its
name: never passed over, since it may be what the next round depends on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from fedlora.errors import FormatError
from fedlora.lora.tree_digest import EMPTY
from fedlora.version import __version__

FORMAT = 3


@dataclass(frozen=True, slots=True)
class Names:
    """The names that changed from one format to the next. Fields are "Class.field", in the older
    format's words."""

    classes: Mapping[str, str] = field(default_factory=dict)
    """Its name of a class to the next format's."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Its name of a field to the next format's, without the class."""
    dropped: frozenset[str] = frozenset()
    """Fields that the next format has no more."""


Older = Mapping[int, Names]
"""By the number of the format that they are the names of."""


def numbered(tree: Any) -> dict[str, Any]:
    """A tree with today's number before it, and room for the file's digest."""
    return {"format": FORMAT, "digest": EMPTY, "tree": tree}


def parted(found: Any, where: object) -> tuple[int, Any]:
    """The format number and the tree in a file's metadata.

    Raises:
        ValueError: it is neither with a number nor without.
        FormatError: a newer fedlora wrote the file.
    """
    if not isinstance(found, dict):
        raise ValueError("it holds no tree")
    if "format" not in found and "tree" not in found:
        return 1, found
    number = found.get("format")
    if type(number) is not int or number < 2:
        raise ValueError(f"its format is {number!r}")
    if number > FORMAT:
        raise FormatError(
            f"{where} has format {number}, written by a newer fedlora: this one, {__version__}, "
            f"reads up to format {FORMAT}. Use the fedlora that wrote it, or one after that"
        )
    return number, found["tree"]


def renamed(
    name: str, values: Mapping[str, Any], steps: Sequence[Names]
) -> tuple[str, dict[str, Any]]:
    """A class and its fields' values under today's names; `steps` lead there, oldest first."""
    now = dict(values)
    for step in steps:
        now = {
            step.fields.get(f"{name}.{key}", key): value
            for key, value in now.items()
            if f"{name}.{key}" not in step.dropped
        }
        name = step.classes.get(name, name)
    return name, now


def make(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """The object of these fields' values.

    Raises:
        FormatError: the class has no such field, or must have one that is not there.
    """
    known: dict[str, Field[Any]] = {f.name: f for f in fields(cls)}
    if unknown := sorted(values.keys() - known.keys()):
        raise FormatError(
            f"{where} holds {cls.__name__}.{unknown[0]}, and a {cls.__name__} has no such field "
            f"in this fedlora, {__version__}: use the one that wrote it"
        )
    needed = {k for k, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - values.keys()):
        raise FormatError(
            f"{where} holds a {cls.__name__} without its {missing[0]}, which this fedlora, "
            f"{__version__}, needs: use the one that wrote it"
        )
    return cls(**values)
