"""The labels of a classification: which there are, and in which order."""

import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import quoted

WHOLE = re.compile(r"-?\d+(\.0*)?")
NUMBER = re.compile(r"-?(\d+[.,]?\d*|[.,]\d+)([eE][-+]?\d{1,3})?")


def as_label(value: str) -> str:
    """A label without the space around it; "" for one that is missing: blank, or "nan".

    A NaN that went through a text file is no class. "NA", "None" and "null" are labels.
    """
    stripped = value.strip()
    return "" if stripped.casefold() == "nan" else stripped


def labels_of(rows: Rows, data: DataConfig) -> tuple[str, ...]:
    """The labels of a classification, in order: data.labels; else the data's numbered classes, also
    those without a row; else those that there are.

    Raises:
        DataError: they are no labels but texts or numbers; or there is one alone; or some differ in
            case or space alone; or a row has one that data.labels lacks.
    """
    if data.labels:
        _check_stated(rows, data)
        return data.labels
    if rows.classes:
        labels = rows.classes
    else:
        labels = in_order(rows.label)
        _check_numbers(labels, data)
        _check_near(rows, data)
    there = len(set(rows.label))
    if there < 2 or 2 * there > len(rows):
        raise DataError(
            f'data.label = "{data.label}" has {there} values in {len(rows)} rows, which is '
            f"no classification: {quoted(rows.label)}"
        )
    return labels


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels: numbers in their order, else as texts."""
    found = set(labels)
    numbers = all(NUMBER.fullmatch(x) for x in found)
    return tuple(sorted(found, key=lambda x: (_size(x), x)) if numbers else sorted(found))


def _size(number: str) -> Decimal:
    """Of a number with a point, or with a comma as some languages write it."""
    return Decimal(number.replace(",", "."))


def _check_stated(rows: Rows, data: DataConfig) -> None:
    if len(set(data.labels)) < len(data.labels) or len(data.labels) < 2:
        raise DataError(f"data.labels = {quoted(data.labels)}: must be two or more, each once")
    check_labels(rows, data.labels, source_of(data), "data.labels")


def source_of(data: DataConfig) -> str:
    """What a message calls the run's rows."""
    return "data.clients" if data.clients else data.path


def _check_numbers(labels: Sequence[str], data: DataConfig) -> None:
    broken = [x for x in labels if not WHOLE.fullmatch(x)]
    if broken and all(NUMBER.fullmatch(x) for x in labels):
        raise DataError(
            f'data.label = "{data.label}" has numbers, {len(labels)} values from {labels[0]} to '
            f"{labels[-1]}, which are no classes: write a column of bins and name that; or, if "
            f'each value is a class, state them in order, data.labels = ["{labels[0]}", ...]'
        )


def _check_near(rows: Rows, data: DataConfig) -> None:
    """No two labels may differ in case, inner space or form of writing alone."""
    count = Counter(rows.label)
    alike: dict[str, list[str]] = {}
    for name in count:
        alike.setdefault(_folded(name), []).append(name)
    near = [sorted(names, key=lambda x: (-count[x], len(x), x)) for names in alike.values()]
    near = sorted(names for names in near if len(names) > 1)
    if near:
        told = "; ".join(", ".join(f'"{x}" ({count[x]} rows)' for x in names) for names in near[:5])
        pairs = [f"{x}={names[0]}" for names in near[:5] for x in names[1:]]
        raise DataError(
            f'data.label = "{data.label}" has labels that are nearly the same: {told}. '
            f"data.map = {json.dumps(pairs, ensure_ascii=False)} brings them together; to keep "
            "them apart state all labels in data.labels"
        )


def _folded(name: str) -> str:
    if NUMBER.fullmatch(name):
        return str(_size(name).normalize())
    return " ".join(unicodedata.normalize("NFKC", name).split()).casefold()


def check_map(
    renames: Mapping[str, str], used: Collection[str], values: Sequence[str], key: str
) -> None:
    """Check that each value that a map renames was there.

    values: what the column has, renamed or not. key: what the config calls the map.

    Raises:
        DataError: one was not; names it, and those that it nearly is.
    """
    unused = sorted(renames.keys() - set(used))
    if not unused:
        return
    count = Counter(values)
    near = [x for x in count if _folded(x) == _folded(unused[0])]
    near += difflib.get_close_matches(unused[0], count.keys() - set(near), n=3, cutoff=0.75)
    told = ", ".join(f'"{x}" ({count[x]} rows)' for x in near)
    raise DataError(
        f'{key}: "{unused[0]}" is no value of that column; '
        + (f"near it is {told}; " if near else "")
        + f"it has {quoted(values)}"
    )


def check_labels(rows: Rows, labels: Sequence[str], path: str, whose: str = "the run") -> None:
    """Check that a source has no labels but those of the run.

    Raises:
        DataError: it has; names the most common, and the label that it nearly is.
    """
    unknown = Counter(label for label in rows.label if label not in set(labels))
    if labels and unknown:
        name, count = unknown.most_common(1)[0]
        near = [x for x in labels if _folded(x) == _folded(name)]
        mend = (
            f'rename it with data.map = ["{name}={near[0]}"]' if near else "rename it with data.map"
        )
        raise DataError(
            f'{path} has the label "{name}" in {count} rows, which {whose} does not know: '
            f"it has {quoted(labels)}; {mend}, or leave those rows out"
        )
