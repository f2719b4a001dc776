"""The labels of a classification: which there are, and in which order."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import quoted


def labels_of(rows: Rows, data: DataConfig) -> tuple[str, ...]:
    """The distinct labels of a classification, in order.

    Raises:
        DataError: there is one alone, or they are no labels but texts.
    """
    labels = in_order(rows.label)
    if len(labels) < 2 or 2 * len(labels) > len(rows):
        raise DataError(
            f'data.label = "{data.label}" has {len(labels)} values in {len(rows)} rows, which is '
            f"no classification: {quoted(rows.label)}"
        )
    return labels


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels: whole numbers in their order, else as texts."""
    found = set(labels)
    numbers = all(re.fullmatch(r"-?\d+", x) for x in found)
    return tuple(sorted(found, key=lambda x: (int(x), x)) if numbers else sorted(found))


def check_labels(rows: Rows, labels: Sequence[str], path: str) -> None:
    """Check that a source has no labels but those of the run.

    Raises:
        DataError: it has; names the most common.
    """
    unknown = Counter(label for label in rows.label if label not in set(labels))
    if labels and unknown:
        name, count = unknown.most_common(1)[0]
        raise DataError(
            f'{path} has the label "{name}" in {count} rows, which the run does not know: '
            f"it has {quoted(labels)}; rename it with data.map, or leave those rows out"
        )
