"""Rows in memory: texts, each with what is to be learned of it, and its number in the book."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Rows:
    """Texts, each with its label, response or target. A selection shares the strings of the whole.

    Which columns there are is the task's affair (`fedlora.training.tasks`).
    """

    text: tuple[str, ...] = ()
    """The text; or the prompt, "" where there is none."""
    label: tuple[str, ...] = ()
    """One class's name, by which rows are dealt out and drawn. Empty where the data has none."""
    response: tuple[str, ...] = ()
    """What is to be written behind the prompt."""
    group: tuple[str, ...] = ()
    """The value of `data.natural-column`, where that is the partition."""
    second: tuple[str, ...] = ()
    """A second text that belongs to the first: the other of a pair."""
    target: tuple[str, ...] = ()
    """What is to be learned where it is neither one class nor a response: a number, a list of names
    (`written`)."""
    number: tuple[int, ...] = field(default=(), compare=False)
    """Of each row, over all that was read: see `fedlora.training.data.account`."""
    unit: tuple[bytes, ...] = field(default=(), compare=False)
    """The unit of privacy of each row, where that is asked for: see row_units.py."""
    picture: tuple[bytes | str, ...] = field(default=(), compare=False)
    """The picture, encoded, or its file's path: see pictures.py. `text` is its digest."""
    classes: tuple[str, ...] = field(default=(), compare=False)
    """Not a column: the data's own numbered classes, in their order, where it has them."""

    def __len__(self) -> int:
        return len(self.text)

    def select(self, numbers: Iterable[int]) -> "Rows":
        at = list(numbers)
        found = (tuple(map(column.__getitem__, at)) if column else () for column in self.columns)
        return replace(Rows(*found), classes=self.classes)

    def without(self, units: Sequence[str]) -> "Rows":
        """Those of other units than these, which are named by their digests in hexadecimal."""
        gone = {bytes.fromhex(x) for x in units}
        if not gone & {*self.unit}:
            return self
        return self.select(i for i, x in enumerate(self.unit) if x not in gone)

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """The rows of all parts, one after the other. A column that a part lacks is left out."""
        filled = [part.columns for part in parts if len(part)]
        found = (
            tuple(value for column in columns for value in column) if all(columns) else ()
            for columns in zip(*filled, strict=True)
        )
        classes = {part.classes for part in parts if len(part)}
        return replace(cls(*found), classes=classes.pop() if len(classes) == 1 else ())

    @property
    def columns(self) -> tuple[tuple[Any, ...], ...]:
        """Every column in the order of the fields; each empty, or a value a row."""
        texts = self.text, self.label, self.response, self.group, self.second, self.target
        return *texts, self.number, self.unit, self.picture

    @property
    def keys(self) -> list[str]:
        """What makes a row distinct, case and space apart: its text or texts, and its response."""
        parts = [column for column in (self.text, self.second, self.response) if any(column)]
        texts = zip(*parts, strict=True) if parts else ()
        return ["\n".join(" ".join(x.split()).casefold() for x in row) for row in texts]


NO_ROWS = Rows()


@dataclass(frozen=True, slots=True)
class ClientRows:
    """What a client trains on, and what it holds out to test on its own distribution."""

    train: Rows
    test: Rows
    validation: Rows = NO_ROWS
    """What it holds out to choose by: no row of its own, and none that equals one of those."""

    @property
    def parts(self) -> tuple[Rows, ...]:
        """What there is, in this order; validation only where there is any."""
        return (self.train, self.test, *([self.validation] if len(self.validation) else []))
