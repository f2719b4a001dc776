"""A data source as a table of columns, and its columns as strings.

Local files are read into memory, so that no copy of a node's own data stays in a cache. CSV and
TSV columns are text as it is written: "01" is no number and "NA" is not missing.
"""

import csv
import difflib
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Formatter
from tempfile import TemporaryDirectory
from typing import Any

import pandas  # type: ignore[import-untyped]
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError, FedLoraError
from fedlora.training.data.locate import locate

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Table:
    """A source's columns, and where its rows stand in it."""

    cells: Dataset
    lines: Sequence[int]
    """The line of the file that each row begins in, or the number of the row: from 1."""
    unit: str = "row"
    """What `lines` counts: "line" or "row"."""
    unmatched: Sequence[int] = ()
    """Lines that data.line-pattern does not match, which are no rows of it."""
    notes: tuple[str, ...] = ()
    """How it was read."""

    @classmethod
    def of(cls, cells: Dataset) -> "Table":
        """A data set, whose rows are counted."""
        return cls(cells, range(1, len(cells) + 1))

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return list(self.cells.column_names)

    def __len__(self) -> int:
        return len(self.cells)


def read(data: DataConfig, key: str, path: str) -> Table:
    """The table at `path`, the value of the config's `key`. Of several splits, `data.split`.

    A file is read by its suffix: .jsonl, .json, .csv, .tsv, .parquet; any other is text, one row
    a line that `data.line-pattern` matches.

    Raises:
        DataError: nothing is there, or it is not what its suffix says, or has no such split.
    """
    with TemporaryDirectory(prefix="fedlora-") as cache, _problems_of(key, path):
        found = _reader(data, key, path, cache)()
    if isinstance(found, Table):
        return found
    if not isinstance(found, DatasetDict):
        return Table.of(found)
    if data.split not in found:
        raise DataError(
            f'{key} = "{path}": no split "{data.split}"; set data.split to one of {quoted(found)}'
        )
    return Table.of(found[data.split])


def column(table: Table, where: str, key: str, name: str) -> list[str]:
    """One column as strings: class numbers by their names, a missing value as "".

    Raises:
        DataError: `where` has no such column; says which it has, and the nearest.
    """
    if name not in table.names:
        near = difflib.get_close_matches(name, table.names, n=1, cutoff=0.5)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise DataError(
            f'{key} = "{name}": {where} has no such column, only {quoted(table.names)}{hint}'
        )
    feature, values = table.cells.features[name], table.cells[name][:]
    if isinstance(feature, ClassLabel):  # -1 is how the hub writes an unknown class
        values = [feature.names[v] if v is not None and v >= 0 else None for v in values]
    elif not isinstance(feature, Value):
        raise DataError(f'{key} = "{name}": {where} has no text there but {feature}')
    return ["" if v is None or (type(v) is float and math.isnan(v)) else str(v) for v in values]


def prompts(table: Table, where: str, prompt: str) -> list[str]:
    """`data.prompt` for every row: a column, a template with {column} names filled in, or ""."""
    if not prompt:
        return [""] * len(table)
    if "{" not in prompt:
        return column(table, where, "data.prompt", prompt)
    try:
        names = [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]
    except ValueError as e:
        raise DataError(f"data.prompt = {prompt!r}: {e}; a brace itself is doubled") from None
    columns = {name: column(table, where, "data.prompt", name) for name in names}
    return [prompt.format(**{n: columns[n][i] for n in names}) for i in range(len(table))]


def quoted(names: Iterable[str]) -> str:
    """The distinct names, sorted, for a message: the first eight of many."""
    shown = sorted(set(names))
    return ", ".join(f'"{name}"' for name in shown[:8]) + (", ..." if len(shown) > 8 else "")


def _reader(data: DataConfig, key: str, path: str, cache: str) -> Callable[[], Any]:
    place, encoding = Path(locate(path)), _without_mark(data.encoding)
    kind = place.suffix.lower()
    local = {"cache_dir": cache, "keep_in_memory": True}
    by_suffix: dict[str, Callable[[], Any]] = {
        ".jsonl": partial(Dataset.from_json, str(place), encoding=encoding, **local),
        ".json": partial(Dataset.from_json, str(place), encoding=encoding, **local),
        ".csv": partial(_csv, place, ",", encoding),
        ".tsv": partial(_csv, place, "\t", encoding),
        ".parquet": partial(Dataset.from_parquet, str(place), **local),
        ".txt": partial(_text, place, data),
    }
    if place.is_file():
        return by_suffix.get(kind, by_suffix[".txt"])
    if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
        return partial(load_from_disk, str(place), keep_in_memory=True)
    if place.is_dir():
        return partial(load_dataset, str(place), **local)
    if kind not in by_suffix and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return partial(load_dataset, path, data.subset or None)
    raise DataError(
        f'{key} = "{path}": no such file or directory, from {Path.cwd()}; '
        'give a path, a hub id as in "owner/name", or "pkg:package/path"'
    )


@contextmanager
def _problems_of(key: str, path: str) -> Iterator[None]:
    """No progress bars, and every way of failing to read as a DataError that names the key."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    except FedLoraError:
        raise
    except (OSError, ValueError, LookupError, DatasetsError) as e:
        reason = e.__cause__ or e
        undecoded = isinstance(reason, UnicodeError) or type(reason) is LookupError
        hint = "; set data.encoding" if undecoded else ""
        if not Path(locate(path)).exists():
            hint = f", and there is no such path from {Path.cwd()}"
        raise DataError(f'{key} = "{path}" cannot be read: {reason}{hint}') from e
    finally:
        if shown:
            enable_progress_bars()


def _without_mark(encoding: str) -> str:
    """UTF-8 with or without a byte-order mark, which is no part of a text; others as they are."""
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def _csv(place: Path, separator: str, encoding: str) -> Dataset:
    """The cells as they are written. A row of more fields than there are columns is an error.

    A stray quotation mark in a TSV would swallow the lines up to the next one: where a cell holds
    a tab and a line's end, the file's quotation marks are taken for letters.
    """
    given: dict[str, Any] = {"sep": separator, "encoding": encoding, "dtype": str}
    given |= {"keep_default_na": False, "index_col": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # it would drop fields
        try:
            cells = pandas.read_csv(place, **given)
            if separator == "\t" and _swallowed(cells):
                log.warning("%s: its quotation marks are read as letters", place)
                cells = pandas.read_csv(place, quoting=csv.QUOTE_NONE, **given)
        except pandas.errors.ParserWarning as e:
            raise ValueError(f"a row has more fields than there are columns ({e})") from None
    return Dataset.from_pandas(cells, preserve_index=False)


def _swallowed(cells: Any) -> bool:
    return any("\t" in x and "\n" in x for name in cells for x in cells[name])


def _text(place: Path, data: DataConfig) -> Table:
    try:
        pattern = re.compile(data.line_pattern)
    except re.error as e:
        raise DataError(f"data.line-pattern is not a regular expression: {e}") from None
    if not pattern.groupindex:
        raise DataError('data.line-pattern needs named groups, as in "(?P<text>.+)"')
    whole = place.read_text(_without_mark(data.encoding))
    lines = [(n, line) for n, line in enumerate(whole.split("\n"), 1) if line.strip()]
    matches = [(n, pattern.match(line)) for n, line in lines]
    found = [match.groupdict() for _, match in matches if match]
    if not found:
        first = f"its first line is {lines[0][1]!r}" if lines else "it has no line"
        raise DataError(
            f"data.line-pattern = {data.line_pattern!r} matches no line of {place}: {first}"
        )
    unmatched = [n for n, match in matches if not match]
    if unmatched:
        log.warning(
            "%s: %d of %d lines do not match data.line-pattern and are left out, the first is %r",
            *(place, len(unmatched), len(lines), dict(lines)[unmatched[0]]),
        )
    at = [n for n, match in matches if match]
    return Table(Dataset.from_list(found), at, "line", unmatched)
