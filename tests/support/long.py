"""Which rows of a grid `make test` runs; the whole grid is `make test-slow`'s."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(rows: Iterable[Any], *here: Any) -> list[Any]:
    """All rows, those that are not named marked slow.

    Raises:
        ValueError: one that is named is no row.
    """
    rows = list(rows)
    if lost := [row for row in here if row not in rows]:
        raise ValueError(f"no rows: {lost}")
    return [row if row in here else _slow(row) for row in rows]


def _slow(row: Any) -> Any:
    return pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow)
