"""A data source as a table of columns, and its columns as strings.

Local files are read into memory, so that no copy of a node's own data stays in a cache. Their cells
are text as it is written: "01" is no number and "NA" is not missing. Null, NaN and blank are.
"""

import difflib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from string import Formatter
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Value,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    get_dataset_config_names,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from pyarrow import parquet

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError, FedLoraError
from fedlora.training.data.delimited import read_delimited
from fedlora.training.data.directories import is_of_pictures, of_split, say_unread
from fedlora.training.data.files import (
    IOB,
    JSON,
    KINDS,
    TEXTS,
    decoded,
    kind_of,
    matched,
    unpacked,
)
from fedlora.training.data.iob import looks_iob, read_iob
from fedlora.training.data.json_rows import read_json
from fedlora.training.data.locate import locate
from fedlora.training.data.parquet_schema import numbered, ordered_by_pandas, schema_of
from fedlora.training.data.picture_folder import read_folder
from fedlora.training.data.written import NUMBER, shown

log = logging.getLogger(__name__)

ANSWERS = ("data.prompt", "data.response", "data.rejected")
"""Keys whose columns are texts, where some files have conversations."""


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
    headers: Sequence[int] = ()
    """Lines that repeat the header, which are no rows either."""
    notes: tuple[str, ...] = ()
    """How it was read."""
    lists: frozenset[str] = frozenset()
    """Columns that hold lists, and so no text."""
    ordered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The values of columns of ordered categories, in their order."""
    by_name: bool = False
    """Do the names of columns that a run asks for decide how its rows are cut into cells?"""

    @classmethod
    def of(cls, cells: Dataset) -> "Table":
        """A data set, whose rows are counted. A column of structs gives columns "meta.label"."""
        if any(isinstance(feature, dict) for feature in cells.features.values()):
            if double := [n for n in cells.features if "." in n and _inside(cells.features, n)]:
                raise ValueError(f"{double[0]!r} is there as a name and within a struct")
            cells = cells.flatten()
        return cls(cells, range(1, len(cells) + 1))

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return list(self.cells.column_names)

    def __len__(self) -> int:
        return len(self.cells)


def _inside(features: Mapping[str, Any], name: str) -> bool:
    """Has a column of structs a field of this dotted name?"""
    found: Any = features
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found is not None


def read(data: DataConfig, key: str, path: str) -> Table:
    """The table at `path`, the value of the config's `key`. Of several splits, `data.split`.

    A file is read by its suffix: .jsonl, .json, .csv, .tsv, .parquet, and .conll, .iob, .iob2,
    .bio; any other is text, one row a line that `data.line-pattern` matches.

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
        hint = f'; did you mean "{shown(near[0])}"?' if near else ""
        if not near and table.unit == "line" and any(map(NUMBER.fullmatch, table.names)):
            hint = "; where the first line is a row, put one with the columns' names before it"
        if len(table.names) == 1 and name in table.names[0]:
            hint += "; if another separator parts them set data.separator"
        raise DataError(
            f'{key} = "{name}": {where} has no such column, only {quoted(table.names)}{hint}'
        )
    feature = table.cells.features[name]
    if isinstance(feature, ClassLabel):  # -1 is how the hub writes an unknown class
        numbers = table.cells[name][:]
        return ["" if v is None or v < 0 else feature.names[v] for v in numbers]
    if not isinstance(feature, Value) or name in table.lists:
        what = "lists" if name in table.lists else feature
        hint = "; conversations are named in data.messages" if key in ANSWERS else ""
        raise DataError(f'{key} = "{name}": {where} has no text there but {what}{hint}')
    if "binary" in feature.dtype:
        raise DataError(
            f'{key} = "{name}": {where} has bytes there, no text: write the column as text, decoded'
        )
    values = table.cells[name][:]
    narrow = {"float32": np.float32, "float16": np.float16}.get(feature.dtype, lambda v: v)
    return [
        "" if v is None or (type(v) is float and math.isnan(v)) else str(narrow(v)) for v in values
    ]


def prompts(table: Table, where: str, prompt: str) -> list[str]:
    """`data.prompt` for every row: a column, a template with {column} names filled in, or ""."""
    if not prompt:
        return [""] * len(table)
    if "{" not in prompt:
        return column(table, where, "data.prompt", prompt)
    columns = {n: column(table, where, "data.prompt", n) for n in _in_prompt(prompt)}
    return [
        _ByName().vformat(prompt, (), {n: columns[n][i] for n in columns})
        for i in range(len(table))
    ]


class _ByName(Formatter):
    """Fills in "{meta.title}" by the whole name: a column's, not an attribute's."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        return kwargs[field_name], field_name


def _in_prompt(prompt: str) -> list[str]:
    """The columns that a data.prompt names."""
    if "{" not in prompt:
        return [prompt] if prompt else []
    try:
        return [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]
    except ValueError as e:
        raise DataError(f"data.prompt = {prompt!r}: {e}; a brace itself is doubled") from None


def quoted(names: Iterable[str]) -> str:
    """The distinct names, sorted, for a message: the first eight of many."""
    every = sorted(set(names))
    listed = ", ".join(f'"{shown(name)}"' for name in every[:8])
    return listed + (", ..." if len(every) > 8 else "")


def _reader(data: DataConfig, key: str, path: str, cache: str) -> Callable[[], Any]:
    place = Path(locate(path))
    local = {"cache_dir": cache, "keep_in_memory": True}
    if place.is_file():
        if place.suffix.lower() == ".parquet":
            return partial(_parquet, place, local)
        return partial(_file, place, data)
    if any((place / f"{name}.json").exists() for name in ("dataset_info", "dataset_dict", "state")):
        return partial(load_from_disk, str(place), keep_in_memory=True)
    if one := of_split(place, data.split):
        say_unread(place, [one])
        return partial(_file, one, data)
    if is_of_pictures(place):
        return partial(_pictures, place, data)
    if place.is_dir():
        return partial(_directory, place, data, key, cache)
    if kind_of(place) not in KINDS and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
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
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, DatasetsError) as e:
        reason = e.__cause__ or e
        undecoded = isinstance(reason, UnicodeError) or type(reason) is LookupError
        hint = "; set data.encoding" if undecoded else ""
        if not Path(locate(path)).exists():
            hint = f", and there is no such path from {Path.cwd()}"
        why = " ".join(str(reason).split())
        raise DataError(f'{key} = "{path}" cannot be read: {why}{hint}') from e
    finally:
        if shown:
            enable_progress_bars()


def _file(place: Path, data: DataConfig) -> Table:
    """A text file by its kind: a table where it is one, or data.separator says so."""
    kind, content = unpacked(place)
    if kind == ".parquet":
        raise ValueError("a Parquet file is compressed in itself: unpack it")
    text, encoding = decoded(content, data.encoding)
    said = () if encoding == "utf-8" else (f"encoding {encoding}",)
    if encoding != data.encoding:
        said = (f"encoding {encoding} by its byte-order mark",)
    if kind in JSON:
        found = read_json(text)
        return Table(_texts(found.columns), found.lines, found.unit, notes=said, lists=found.lists)
    if kind in IOB:
        return _sentences(text, data, said)
    if kind in (".csv", ".tsv") or data.separator:
        mark = "\t" if data.separator == "tab" else data.separator
        usual = "\t" if kind == ".tsv" else ","
        cells = read_delimited(text, mark, _asked(data), usual)
        table = Table(_texts(cells.columns), cells.lines, "line", headers=cells.headers)
        return replace(table, notes=(*cells.notes, *said), by_name=cells.by_name)
    return _text(text, place, data, said)


def _sentences(text: str, data: DataConfig, said: tuple[str, ...]) -> Table:
    """A row a sentence: its words as data.text, its tags as data.label."""
    if data.text == data.label:
        raise ValueError(f"data.text and data.label are both {data.text!r}: give them two names")
    found = read_iob(text)
    columns = {data.text: found.words, data.label: found.tags}
    kind = pyarrow.list_(pyarrow.string())
    cells = Dataset(pyarrow.table({name: pyarrow.array(x, kind) for name, x in columns.items()}))
    return Table(cells, found.lines, "line", notes=said, lists=frozenset(columns))


def _pictures(place: Path, data: DataConfig) -> Table:
    """A row a picture: its file's path as data.image, its folder's name as data.label."""
    found = read_folder(place, data.split)
    cells = _texts({data.image: found.files, data.label: found.classes})
    return Table(cells, range(1, len(cells) + 1), "file", notes=found.notes)


def _parquet(place: Path, how: Mapping[str, Any]) -> Table:
    """A Parquet file, without its columns of types that a data set has no equivalent for."""
    schema = schema_of(place)
    none = pyarrow.types.is_map, pyarrow.types.is_fixed_size_binary
    names = [column.name for column in schema if not any(is_(column.type) for is_ in none)]
    if len(names) == len(schema):
        cells = Dataset.from_parquet(str(place), **how)
    else:
        found = parquet.read_table(place, columns=names)
        plain = [
            f.with_type(f.type.value_type) if pyarrow.types.is_dictionary(f.type) else f
            for f in found.schema
        ]
        cells = Dataset(found.cast(pyarrow.schema(plain)))
        for name, kind in numbered(schema.metadata or {}):
            cells = cells.cast_column(name, kind) if name in names else cells
    ordered = {}
    for column in schema:
        if pyarrow.types.is_dictionary(column.type) and column.type.ordered:
            found = parquet.read_table(place, columns=[column.name])[column.name]
            values = found.unify_dictionaries().chunk(0).dictionary if len(found) else []
            ordered[column.name] = tuple(str(value) for value in values)
    lost = [n for n in ordered_by_pandas(schema.metadata or {}) if n in names and n not in ordered]
    notes = [f"the order of {name}'s categories is not in the file: data.labels" for name in lost]
    return replace(Table.of(cells), ordered=ordered, notes=tuple(notes))


def _directory(place: Path, data: DataConfig, key: str, cache: str) -> Any:
    """What `datasets` finds in a directory: text files are read as they are written, one after the
    other, and others as it reads them. No script of it is run."""
    if (script := place / f"{place.resolve().name}.py").is_file():
        raise DataError(
            f'{key} = "{place}": {script.name} is a script, and no code of a data set is run; name '
            "a directory that save_to_disk wrote of what it makes, or files"
        )
    names = get_dataset_config_names(str(place))
    if len(names) > 1 and data.subset not in names:
        raise DataError(f'{key} = "{place}": set data.subset to one of {quoted(names)}')
    builder = load_dataset_builder(str(place), data.subset or None, cache_dir=cache)
    every = {split: [Path(f) for f in x] for split, x in (builder.config.data_files or {}).items()}
    files = every.get(data.split, [])
    say_unread(place, [f for x in every.values() for f in x])
    if not files or any(kind_of(file) not in TEXTS for file in files):
        how = {"cache_dir": cache, "keep_in_memory": True}
        return load_dataset(str(place), data.subset or None, **how)
    tables = [_file(file, data) for file in files]
    if other := [f.name for f, t in zip(files, tables, strict=True) if t.names != tables[0].names]:
        raise ValueError(f"{other[0]} has other columns than {files[0].name}")
    if len(tables) == 1:
        return tables[0]
    cells = concatenate_datasets([table.cells for table in tables])
    lists = frozenset[str]().union(*(table.lists for table in tables))
    notes = dict.fromkeys(note for table in tables for note in table.notes)
    if again := sum(len(table.headers) for table in tables):
        notes |= {f"{again} lines that repeat the header left out": None}
    said, by_name = (f"{len(files)} files", *notes), any(table.by_name for table in tables)
    rows = range(1, len(cells) + 1)
    return Table(cells, rows, "row", notes=said, lists=lists, by_name=by_name)


def _texts(columns: Mapping[str, Sequence[str | None]]) -> Dataset:
    return Dataset(pyarrow.table({name: pyarrow.array(x, "string") for name, x in columns.items()}))


def _asked(data: DataConfig) -> list[str]:
    """The columns that the config names: a file that has them is read as it should be."""
    names = [data.text, data.label, data.response, data.natural_column]
    return [name for name in names if name] + _in_prompt(data.prompt)


def _text(text: str, place: Path, data: DataConfig, said: tuple[str, ...]) -> Table:
    try:
        pattern = re.compile(data.line_pattern)
    except re.error as e:
        raise DataError(f"data.line-pattern is not a regular expression: {e}") from None
    if not pattern.groupindex:
        raise DataError('data.line-pattern needs named groups, as in "(?P<text>.+)"')
    columns, lines, others = matched(text, pattern)
    if not lines:
        first = f"its first line is {others[0][1]!r}" if others else "it has no line"
        raise DataError(
            f"data.line-pattern = {data.line_pattern!r} matches no line of {place}: {first}; for a "
            "table with a header set data.separator"
            + ("; a word and its tag a line are read of files named .conll" * looks_iob(text))
        )
    if others:
        log.warning(
            "%s: %d of %d lines do not match data.line-pattern and are left out, the first is %r",
            *(place, len(others), len(others) + len(lines), others[0][1]),
        )
    return Table(_texts(columns), lines, "line", [n for n, _ in others], notes=said)
