"""What a Parquet file says of its columns beside their types: classes, and orders of categories."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel
from pyarrow import parquet  # type: ignore[import-untyped]


def schema_of(place: Path) -> Any:
    """The file's schema.

    Raises:
        ValueError: it has no rows, or a column twice.
    """
    schema = parquet.read_schema(place)
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise ValueError(f"it has the column {twice[0]!r} twice; rename one")
    if not parquet.read_metadata(place).num_rows:
        raise ValueError("it has no rows")
    return schema


def numbered(metadata: Mapping[bytes, bytes]) -> Iterator[tuple[str, ClassLabel]]:
    """The columns that `datasets` wrote as numbered classes."""
    said = json.loads(metadata.get(b"huggingface", b"{}"))
    for name, feature in said.get("info", {}).get("features", {}).items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            yield name, ClassLabel(names=feature["names"])


def ordered_by_pandas(metadata: Mapping[bytes, bytes]) -> list[str]:
    """The columns that pandas had as ordered categories; of numbers, Parquet keeps no order."""
    columns = json.loads(metadata.get(b"pandas", b"{}")).get("columns", [])
    return [c["name"] for c in columns if (c.get("metadata") or {}).get("ordered")]
