"""Parquet files and directories of `datasets`: text as it is written, labels in their own order."""

import datetime
import json
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pyarrow import parquet

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data.corpus import Corpus
from fedlora.training.data.list_columns import classes
from fedlora.training.data.tables import column, read
from tests.support.by_task import load

STAMP = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC).replace(tzinfo=None)
KINDS: dict[str, tuple[pa.Array, list[str]]] = {
    "string": (pa.array(["a", None, "NA", "nan", "01"]), ["a", "", "NA", "nan", "01"]),
    "large_string": (pa.array(["a", None], pa.large_string()), ["a", ""]),
    "dictionary": (pa.array(["b", None, "a"]).dictionary_encode(), ["b", "", "a"]),
    "numbers by dictionary": (pa.array([3, None]).dictionary_encode(), ["3", ""]),
    "bool": (pa.array([True, None, False]), ["True", "", "False"]),
    "int8": (pa.array([1, None], pa.int8()), ["1", ""]),
    "uint64": (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
    "float64": (pa.array([1.0, None, float("nan"), 0.1]), ["1.0", "", "", "0.1"]),
    "float32": (pa.array([0.1, float("nan"), None], pa.float32()), ["0.1", "", ""]),
    "float16": (pa.array(np.array([0.1], np.float16)), ["0.1"]),
    "decimal": (pa.array([Decimal("1.50"), None]), ["1.50", ""]),
    "date": (pa.array([datetime.date(2024, 1, 2), None]), ["2024-01-02", ""]),
    "timestamp": (pa.array([STAMP, None]), ["2024-01-02 03:04:05", ""]),
    "time zone": (pa.array([STAMP], pa.timestamp("us", "UTC")), ["2024-01-02 03:04:05+00:00"]),
    "null": (pa.array([None, None]), ["", ""]),
}
REFUSED = {
    "list": (pa.array([["a"]]), "has no text there but List"),
    "large_list": (pa.array([["a"]], pa.large_list(pa.string())), "no text there but LargeList"),
    "list of structs": (pa.array([[{"a": 1}]]), "has no text there but List"),
    "struct": (pa.array([{"a": "x"}]), r'no such column, only "text", "x\.a"; did you mean "x\.a"'),
    "binary": (pa.array([b"a"]), "has bytes there"),
    "map": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "has no such column"),
}  # fmt: skip


def parquet_of(tmp_path: Path, values: pa.Array) -> str:
    path = tmp_path / "a.parquet"
    texts = [f"t{i}" for i in range(len(values))]
    parquet.write_table(pa.table({"text": texts, "x": values}), path)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_is_text_as_it_is_written_and_missing_by_one_rule(tmp_path: Path, kind: str):
    values, want = KINDS[kind]
    table = read(DataConfig(), "data.path", parquet_of(tmp_path, values))
    assert column(table, "f", "data.label", "x") == want


@pytest.mark.parametrize("kind", REFUSED)
def test_a_column_of_no_text_is_refused_and_no_other_column_with_it(tmp_path: Path, kind: str):
    values, says = REFUSED[kind]
    table = read(DataConfig(), "data.path", parquet_of(tmp_path, values))
    assert column(table, "f", "data.text", "text") == ["t0"]
    with pytest.raises(DataError, match=says):
        column(table, "f", "data.label", "x")


def test_ordered_categories_keep_their_order_and_others_are_by_the_alphabet(tmp_path: Path):
    names = [["poor", "good", "fair"][i % 3] for i in range(30)]
    for ordered, want in ((True, ("poor", "fair", "good")), (False, ("fair", "good", "poor"))):
        label = pd.Categorical(names, ["poor", "fair", "good"], ordered=ordered)
        frame = pd.DataFrame({"text": [f"t{i}" for i in range(30)], "label": label})
        frame.to_parquet(tmp_path / "a.parquet")
        assert corpus_of(tmp_path / "a.parquet").labels == want
    table = read(DataConfig(), "data.path", str(tmp_path / "a.parquet"))
    assert classes(table, "text") == ()


@pytest.mark.parametrize("beside", ["map", "fixed"])
def test_numbered_classes_keep_their_order_beside_a_column_that_is_left_out(
    tmp_path: Path, beside: str
):
    numbered(9).to_parquet(tmp_path / "a.parquet")
    whole = pa.parquet.read_table(tmp_path / "a.parquet")
    odd = {"map": pa.array([[("a", 1)]] * 9, pa.map_("string", "int64")),
           "fixed": pa.array([b"ab"] * 9, pa.binary(2))}[beside]  # fmt: skip
    pa.parquet.write_table(whole.append_column("odd", odd), tmp_path / "b.parquet")
    assert corpus_of(tmp_path / "b.parquet").labels == corpus_of(tmp_path / "a.parquet").labels
    assert corpus_of(tmp_path / "b.parquet").labels[0] == "zeta"


def test_an_order_of_numbers_that_parquet_does_not_keep_is_said(tmp_path: Path):
    label = pd.Categorical([3, 1, 2] * 10, [3, 1, 2], ordered=True)
    frame = pd.DataFrame({"text": [f"t{i}" for i in range(30)], "label": label})
    frame.to_parquet(tmp_path / "a.parquet")
    (source,) = corpus_of(tmp_path / "a.parquet").account.sources
    assert source.notes == ("the order of label's categories is not in the file: data.labels",)


# -- directories ------------------------------------------------------------------------------

FEATURES = Features(
    {"text": Value("string"), "label": ClassLabel(names=["zeta", "alpha", "unused"])}
)


def numbered(n: int = 30) -> Dataset:
    rows = {"text": [f"t{i}" for i in range(n)], "label": [i % 2 for i in range(n)]}
    return Dataset.from_dict(rows, features=FEATURES)


def corpus_of(path: Path, **keys: object) -> Corpus:
    given = {"path": str(path), "test_size": 4, "partition": "iid", **keys}
    return load(DataConfig.model_validate(given), "classification", 2, 0)


def saved(at: Path) -> None:
    numbered().save_to_disk(at)


def sharded(at: Path) -> None:
    numbered().save_to_disk(at, num_shards=3)


def of_splits(at: Path) -> None:
    DatasetDict({"train": numbered(), "test": numbered(6)}).save_to_disk(at)


def selected(at: Path) -> None:
    numbered(60).select(range(0, 60, 2)).filter(lambda r: r["text"] != "t0").add_item(
        {"text": "t0", "label": 1}
    ).save_to_disk(at)


def of_the_hub(at: Path) -> None:
    (at / "data").mkdir(parents=True)
    numbered().to_parquet(at / "data" / "train-00000-of-00001.parquet")
    numbered(6).to_parquet(at / "data" / "test-00000-of-00001.parquet")
    (at / "README.md").write_text("# A data set\n")


@pytest.mark.parametrize("write", [saved, sharded, of_splits, of_the_hub])
def test_a_directory_of_datasets_keeps_its_classes_and_its_splits(
    tmp_path: Path, write: Callable[[Path], None]
):
    write(tmp_path / "d")
    corpus = corpus_of(tmp_path / "d")
    assert corpus.labels == ("zeta", "alpha", "unused")
    assert corpus.account.sources[0].read == 30
    if write in (of_splits, of_the_hub):
        with pytest.raises(
            DataError, match=r'no split "dev"; set data.split to one of "test", "tr'
        ):
            corpus_of(tmp_path / "d", split="dev")


def test_a_selection_is_saved_and_read_as_it_is(tmp_path: Path):
    selected(tmp_path / "d")
    corpus = corpus_of(tmp_path / "d")
    texts = {t for c in corpus.clients for p in (c.train, c.test) for t in p.text}
    assert texts | {*corpus.test.text} == {f"t{i}" for i in range(0, 60, 2)}


def test_text_files_of_a_directory_are_read_as_they_are_written(tmp_path: Path):
    for name in "ab":
        lines = [f"{name}{i},0{i % 2}" for i in range(20)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    corpus = corpus_of(tmp_path)
    assert corpus.labels == ("00", "01")
    assert corpus.account.sources[0].read == 40
    assert corpus.account.sources[0].notes[0] == "2 files"
    (tmp_path / "b.csv").write_text("text,other\nx,y\n")
    with pytest.raises(DataError, match=r"b\.csv has other columns than a\.csv"):
        corpus_of(tmp_path)


def test_of_several_configurations_one_is_named(tmp_path: Path):
    for n, name in ((20, "a"), (30, "b")):
        (tmp_path / name).mkdir()
        numbered(n).to_parquet(tmp_path / name / "train.parquet")
    configs = [f"- config_name: {x}\n  data_files: {x}/train.parquet\n" for x in "ab"]
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    assert corpus_of(tmp_path, subset="b").account.sources[0].read == 30
    for subset in ("", "c"):
        with pytest.raises(DataError, match=r'set data\.subset to one of "a", "b"'):
            corpus_of(tmp_path, subset=subset)


def test_a_data_set_s_script_is_never_run(tmp_path: Path):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (place / "train.csv").write_text("text,label\n")
    (place / "more.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"mine\.py is a script, and no code of a data set is run"):
        corpus_of(place, split="all")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [("state.json", b"[]"), ("state.json", None), ("dataset_info.json", None),
     ("dataset_info.json", b"{"), ("data-00000-of-00001.arrow", b"\xff\xff\xff\xff"),
     ("data-00000-of-00001.arrow", None)],
)  # fmt: skip
def test_a_directory_that_is_damaged_is_one_line(tmp_path: Path, file: str, content: bytes | None):
    saved(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "d")
    path = tmp_path / "d" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r'data\.path = ".*d" cannot be read: ') as caught:
        corpus_of(tmp_path / "d")
    assert "\n" not in str(caught.value)


def test_shards_of_json_lines_keep_their_dates(tmp_path: Path):
    for n in range(2):
        rows = [{"text": f"{n} {i}", "label": f"2024-01-0{1 + i % 2}"} for i in range(20)]
        file = tmp_path / f"train-0000{n}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert corpus_of(tmp_path).labels == ("2024-01-01", "2024-01-02")
