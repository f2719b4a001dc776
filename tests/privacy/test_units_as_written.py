"""A row is one unit however it is written and whatever a run calls its columns.

Each case is one file's rows written in another way, or read under other names: the sets must meet.
"""

import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.privacy.units import Units
from fedlora.training.data.rows import Rows
from tests.support.by_task import load_node

PLAIN = "text,label,n\n" + "".join(
    f"Caf\u00e9 {i} \u00e0 la,{'ab'[i % 2]},{i}.50\n" for i in range(20)
)


def units_of(path: Path, task: str = "classification", **data: Any) -> Units:
    config = DataConfig(**{"node_path": str(path), "client_test_fraction": 0.0, **data})
    labels = ("O", "B-PER") if task == "token-classification" else ("a", "b")
    found = Units.of(load_node(config, task, labels, units=True).train, config)
    assert found is not None
    return found


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


WAYS = {
    "line ends": lambda p: written(p / "x.csv", PLAIN.replace("\n", "\r\n")),
    "a byte-order mark": lambda p: written(p / "x.csv", PLAIN, "utf-8-sig"),
    "UTF-16": lambda p: written(p / "x.csv", PLAIN, "utf-16"),
    "tabs": lambda p: written(p / "x.tsv", PLAIN.replace(",", "\t")),
    "space": lambda p: written(p / "x.csv", PLAIN.replace(" \u00e0 la", "  \u00e0 la ")),
    "case": lambda p: written(p / "x.csv", PLAIN.replace("Caf\u00e9", "CAF\u00c9")),
    "forms of letters": lambda p: written(p / "x.csv", unicodedata.normalize("NFD", PLAIN)),
    "numbers": lambda p: written(p / "x.csv", PLAIN.replace(".50\n", ".5\n")),
    "names of columns": lambda p: written(p / "x.csv", PLAIN.replace(",n\n", ",number\n", 1)),
    "JSON": lambda p: _to(p / "x.jsonl", pd.DataFrame.to_json, orient="records", lines=True),
    "Parquet": lambda p: _to(p / "x.parquet", pd.DataFrame.to_parquet),
    "an empty column more": lambda p: written(
        p / "x.csv", PLAIN.replace("\n", ",\n").replace(",n,", ",n,x", 1)
    ),
}


def _to(path: Path, write: Any, **how: Any) -> Path:
    write(pd.read_csv(written(path.with_name("plain.csv"), PLAIN)), path, **how)
    return path


@pytest.mark.parametrize("way", WAYS)
def test_however_a_row_is_written_it_is_one_unit(tmp_path: Path, way: str) -> None:
    before = units_of(written(tmp_path / "rows.csv", PLAIN))
    after = units_of(WAYS[way](tmp_path))
    assert (before.reading, before.digests) == (after.reading, after.digests)


IOB = "".join(f"word{i} B-PER\nsays O\n\n" for i in range(20))


@pytest.mark.parametrize("names", [{"text": "x"}, {"label": "y"}, {"text": "label", "label": "t"}])
def test_what_a_run_calls_the_columns_of_a_file_without_names_is_not_in_the_unit(
    tmp_path: Path, names: dict[str, str]
) -> None:
    path = written(tmp_path / "rows.iob", IOB)
    before, after = (units_of(path, "token-classification", **x) for x in ({}, names))
    assert (before.reading, before.digests) == (after.reading, after.digests)
    with pytest.raises(DataError, match="are both 'tag': give them two names"):
        units_of(path, "token-classification", text="tag", label="tag")


def test_no_name_that_a_run_asks_for_cuts_rows_otherwise(tmp_path: Path) -> None:
    """A header as the name of one column: then another separator has it, and cuts nothing."""
    path = written(tmp_path / "rows.csv", "text,response\n" + "one,two\nthree,four\n")
    whole = {"text": "text,response", "response": "text,response"}
    with pytest.raises(DataError, match=r"which separator .* set data\.separator"):
        units_of(path, "causal-lm", **whole)
    said, found = ({"separator": x} for x in (";", ""))
    readings = {units_of(path, "causal-lm", **x).reading for x in ({**whole, **said}, found)}
    assert len(readings) == 2, "where it is said, sets of both meet"
    data = DataConfig(node_path=str(path), client_test_fraction=0.0, **whole)
    assert len(load_node(data, "causal-lm", ()).train) == 2, "without privacy it is read"


def test_what_cannot_be_compared_is_of_another_reading() -> None:
    rows, data = Rows(text=("x",), unit=(b"u" * 16,)), DataConfig(path="x")
    sites = ({"path": "a.csv"}, {"path": "a.csv", "separator": ";"})
    others = [
        Units.of(rows, data),
        Units.of(replace(rows, picture=(b"p",)), data),
        *(Units.of(rows, data.model_copy(update={name: "z"}))
          for name in ("separator", "encoding", "line_pattern", "unit_column")),
        Units.of(rows, DataConfig(clients=sites[1:])),
    ]  # fmt: skip
    assert len({x.reading for x in others if x}) == len(others)
    plain = Units.of(rows, DataConfig(clients=sites[:1]))
    assert plain == others[0], "sites as they are read by themselves"


def test_a_person_is_one_however_the_name_is_spaced(tmp_path: Path) -> None:
    cells = "".join(f"row {i},a,p{i // 2}{' ' * (i % 2)}\n" for i in range(20))
    found = units_of(written(tmp_path / "x.csv", "text,label,who\n" + cells), unit_column="who")
    assert (len(found.digests), found.most) == (10, 2)


@pytest.mark.parametrize("way", ["CSV", "zeros", "JSON", "Parquet", "one more, of nobody"])
def test_a_person_is_one_however_the_name_or_number_is_written(tmp_path: Path, way: str) -> None:
    """A whole number too, which pandas makes a decimal one where one row lacks its own."""
    rows = pd.DataFrame({"text": [f"row {i}" for i in range(20)], "label": ["a", "b"] * 10,
                         "who": [i // 2 for i in range(20)]})  # fmt: skip
    before = units_of(_kept(rows, tmp_path / "rows.csv"), unit_column="who")
    more = pd.DataFrame({"text": ["of nobody"], "label": ["a"], "who": [None]})
    after = {
        "CSV": lambda: _kept(rows, tmp_path / "x.csv"),
        "zeros": lambda: _kept(rows.assign(who=[f"0{i // 2}" for i in range(20)]),
                               tmp_path / "x.csv"),
        "JSON": lambda: _kept(rows.astype({"who": float}), tmp_path / "x.jsonl"),
        "Parquet": lambda: _kept(rows, tmp_path / "x.parquet"),
        "one more, of nobody": lambda: _kept(pd.concat([rows, more]), tmp_path / "x.parquet"),
    }[way]()  # fmt: skip
    found = units_of(after, unit_column="who")
    assert (len(before.digests), before.most) == (10, 2)
    assert (before.reading, before.digests) == (found.reading, found.digests)


def test_names_that_differ_in_case_are_one_person(tmp_path: Path) -> None:
    cells = "".join(f"row {i},a,{('Ann', 'ANN')[i % 2]} {i // 4}\n" for i in range(20))
    found = units_of(written(tmp_path / "x.csv", "text,label,who\n" + cells), unit_column="who")
    assert (len(found.digests), found.most) == (5, 4)


def _kept(rows: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        rows.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        rows.to_json(path, orient="records", lines=True)
    else:
        rows.to_parquet(path)
    return path


def test_a_row_more_in_a_file_can_change_which_others_are_trained_on(tmp_path: Path) -> None:
    """What no epsilon covers: neighbours are two training sets, not two files."""
    given = [f"row {i},{'ab'[i % 2]}\n" for i in range(41)]
    one, more = (
        units_of(written(tmp_path / f"{n}.csv", "text,label\n" + "".join(given[:n])),
                 client_test_fraction=0.25)
        for n in (40, 41)
    )  # fmt: skip
    assert len(one.digests ^ more.digests) > 1
