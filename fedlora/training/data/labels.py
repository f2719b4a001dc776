"""The labels of a task that chooses from names: which there are, and in which order."""

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import quoted
from fedlora.training.data.written import (
    NUMBER,
    WHOLE,
    alike,
    folded,
    near,
    shown,
    size,
    told,
    trimmed,
)


def as_label(value: str) -> str:
    """A label without the space around it; "" for one that is missing: blank, or "nan".

    A NaN that went through a text file is no class. "NA", "None" and "null" are labels.
    """
    stripped = value.strip()
    return "" if stripped.casefold() == "nan" or not trimmed(stripped) else stripped


def labels_of(rows: Rows, data: DataConfig) -> tuple[str, ...]:
    """The labels of a classification, in order: data.labels; else the data's numbered classes, also
    those without a row; else those that there are.

    Raises:
        DataError: they are no labels but texts or numbers; or there is one alone; or some differ in
            case or space alone; or a row has one that data.labels lacks.
    """
    if data.labels:
        _check_stated(rows.label, data)
        return data.labels
    if rows.classes:
        labels = rows.classes
    else:
        labels = in_order(rows.label)
        _check_numbers(labels, data)
        _check_near(rows.label, data)
    there = len(set(rows.label))
    if there < 2 or 2 * there > len(rows):
        raise DataError(
            f'data.label = "{data.label}" has {there} values in {len(rows)} rows, which is '
            f"no classification: {quoted(rows.label)}"
        )
    return labels


def names_of(rows: Rows, names: Sequence[str], data: DataConfig) -> tuple[str, ...]:
    """The names to choose from where a row has several of them, or none, in the order of
    `labels_of`. names: of all rows.

    Raises:
        DataError: there is none, or some differ in case or space alone, or a row has one that
            data.labels lacks.
    """
    if data.labels:
        _check_stated(names, data)
        return data.labels
    found = rows.classes or in_order(names)
    if not found:
        raise DataError(f'data.label = "{data.label}" has no name in any of its {len(rows)} rows')
    if not rows.classes:
        _check_near(names, data)
    return found


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels: numbers by their size, with those few that are none behind them; else as
    texts."""
    found = set(labels)
    others = _no_numbers(found)
    if 4 * len(others) > len(found):
        return tuple(sorted(found))
    numbers = sorted(found - others, key=lambda x: (size(x), x))
    return (*numbers, *sorted(others))


def _no_numbers(labels: Collection[str]) -> set[str]:
    return {x for x in labels if not NUMBER.fullmatch(x)}


def doubts(labels: Sequence[str]) -> tuple[str, ...]:
    """What a user should look at before labels like these are trained on."""
    found = []
    for names in alike(labels)[:5]:
        pair = ", ".join(f'"{shown(x)}"' for x in names)
        found.append(f"the labels {pair} differ in accents or punctuation alone (data.map).")
    marked = [x for x in labels if len(x) > 2 and folded(x)[:1] == folded(x)[-1:] in ("'", '"')]
    if marked:
        found.append(f"quotation marks are a part of the label {marked[0]} (data.map).")
    others = _no_numbers(labels)
    if others and 4 * len(others) <= len(labels):
        found.append(
            f"all labels are numbers but {quoted(others)}: a class of its own, behind them; where "
            f"it stands for none, leave its rows out: {_without(min(others))}."
        )
    elif nameless := _nameless(labels):
        found.append(
            f'"{shown(nameless)}" is a class of its own; where it stands for rows without a label, '
            f"leave these out: {_without(nameless)}."
        )
    return tuple(found)


def _nameless(labels: Sequence[str]) -> str:
    """The label by which many data sets say that a row has none: a -1 below 0 and 1, or one
    without a letter or digit; "" where there is no such, or several."""
    found = [x for x in labels if not any(map(str.isalnum, x))]
    if {"-1", "0", "1"} <= {*labels} and all(map(WHOLE.fullmatch, labels)):
        found.append("-1")
    return found[0] if len(found) == 1 else ""


def _without(label: str) -> str:
    return f'data.map = ["{shown(label)}="]'


def _check_stated(names: Iterable[str], data: DataConfig) -> None:
    if len(set(data.labels)) < len(data.labels) or len(data.labels) < 2:
        raise DataError(f"data.labels = {quoted(data.labels)}: must be two or more, each once")
    check_labels(names, data.labels, source_of(data), "data.labels")


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


def _check_near(names: Iterable[str], data: DataConfig) -> None:
    """No two labels may differ in case, space, dashes, marks or form of writing alone."""
    count = Counter(names)
    if groups := near(count):
        pairs = [shown(f"{x}={names[0]}") for names in groups[:5] for x in names[1:]]
        mend = ", ".join(f'"{pair}"' for pair in pairs)
        raise DataError(
            f'data.label = "{data.label}" has labels that are nearly the same: '
            f"{told(groups, count)}. data.map = [{mend}] brings them together; to keep "
            "them apart state all labels in data.labels"
        )


def check_clients(values: Sequence[str], data: DataConfig) -> None:
    """No two values of data.natural-column, each a client, may be nearly the same.

    Raises:
        DataError: they are.
    """
    count = Counter(values)
    if groups := near(count):
        raise DataError(
            f'data.natural-column = "{data.natural_column}" has values that are nearly the same, '
            f"and would be clients each: {told(groups, count)}; write them alike, or name a "
            "column whose values differ"
        )


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
    close = [x for x in count if folded(x) == folded(unused[0])]
    close += difflib.get_close_matches(unused[0], count.keys() - set(close), n=3, cutoff=0.75)
    listed = ", ".join(f'"{shown(x)}" ({count[x]} rows)' for x in close)
    raise DataError(
        f'{key}: "{shown(unused[0])}" is no value of that column; '
        + (f"near it is {listed}; " if close else "")
        + f"it has {quoted(values)}"
    )


def check_labels(
    names: Iterable[str], labels: Sequence[str], path: str, whose: str = "the run"
) -> None:
    """Check that a source has no labels but those of the run. names: the label of each row.

    Raises:
        DataError: it has; names the most common, and the label that it nearly is.
    """
    known = set(labels)
    unknown = Counter(name for name in names if name not in known)
    if labels and unknown:
        name, count = unknown.most_common(1)[0]
        close = [x for x in labels if folded(x) == folded(name)]
        mend = "rename it with data.map"
        mend += f' = ["{shown(name)}={close[0]}"]' if close else ""
        raise DataError(
            f'{path} has the label "{shown(name)}" in {count} rows, which {whose} does not know: '
            f"it has {quoted(labels)}; {mend}, or leave those rows out: {_without(name)}"
        )
