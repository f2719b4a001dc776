"""Files as people have them: nothing of a row is lost, shifted or changed without a word."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv as pyarrow_csv

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.errors import ConfigError, DataError
from fedlora.training.data.corpus import Corpus, Rows
from fedlora.training.data.delimited import read_delimited
from fedlora.training.data.json_rows import read_json
from fedlora.training.data.labels import in_order
from tests.support.by_task import load

PAIRS = [(f"text {i}", "ab"[i % 2]) for i in range(12)]


def corpus_of(file: Path, task: str = "classification", **changes: object) -> Corpus:
    given = {"path": str(file), "partition": "iid", "test_size": 0, "dedupe": False, **changes}
    return load(DataConfig(**given), task, 1, 0)  # type: ignore[arg-type]


def rows_of(file: Path, task: str = "classification", **changes: object) -> Rows:
    (client,) = corpus_of(file, task, **changes).clients
    return Rows.joined([client.train, client.test])


def refusal(file: Path, **changes: object) -> str:
    with pytest.raises(DataError) as e:
        corpus_of(file, **changes)
    return str(e.value)


def table(pairs: list[tuple[str, str]] = PAIRS, mark: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=mark).writerows([("text", "label"), *pairs])
    return out.getvalue()


# -- separators, quotation marks, lengths ---------------------------------------------------------


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_separator_is_found_and_told(tmp_path, mark, suffix):
    file = tmp_path / f"rows{suffix}"
    file.write_text(table([(f"a, b; c {i}", x) for i, (_, x) in enumerate(PAIRS)], mark))
    assert sorted(rows_of(file).text)[0] == "a, b; c 0"
    (source,) = corpus_of(file).account.sources
    name = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}[mark]
    assert source.notes == (f"separator {name}, found",)


def test_a_separator_that_is_set_makes_any_text_file_a_table(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text(table(PAIRS, "\t"))
    assert sorted(rows_of(file, separator="tab").text) == sorted(t for t, _ in PAIRS)
    assert "separator" in refusal(tmp_path / "rows.txt")
    with pytest.raises(ConfigError, match=r"data\.separator"):
        Config.read({"data.separator": ";;"})


def test_excel_s_own_line_states_the_separator(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("sep=;\r\n" + table(PAIRS, ";"), newline="")
    assert len(rows_of(file)) == 12
    file.write_text("sep=;\n" + table(PAIRS, ";") + "short\n")
    assert "line 15 has 1" in refusal(file)
    file.write_text("sep=;\n" + table(PAIRS, ";") + '"stray;a\n')
    assert "line 15: a quotation mark there does not pair" in refusal(file)
    file.write_text(table(PAIRS, "^"))
    assert "set data.separator" in refusal(file)
    assert len(rows_of(file, separator="^")) == 12
    file.write_text("sep=;\r" + table(PAIRS, ";").replace("\r\n", "\r"), newline="")
    assert len(rows_of(file)) == 12


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=8), st.sampled_from(",;\t|"))
def test_what_a_csv_writer_wrote_is_read_or_refused_never_changed(rows, mark):
    """Python's writer, all cells quoted; pyarrow's reader with types off is the oracle."""
    out = io.StringIO()
    csv.writer(out, delimiter=mark, quoting=csv.QUOTE_ALL).writerows([("x", "y", "z"), *rows])
    try:
        found = read_delimited(out.getvalue(), mark)
    except ValueError as e:
        if "by itself" not in str(e):  # it looks just like a file with stray marks
            raise
        return
    if found.notes[-1].endswith("letters"):
        return
    kept = [row for row in rows if any(map(str.strip, row)) or len(row) > 1]
    assert [*zip(*found.columns.values(), strict=True)] == kept
    oracle = pyarrow_csv.read_csv(
        io.BytesIO(out.getvalue().encode()),
        parse_options=pyarrow_csv.ParseOptions(delimiter=mark, newlines_in_values=True),
        convert_options=pyarrow_csv.ConvertOptions(
            column_types={n: pyarrow.string() for n in "xyz"}, strings_can_be_null=False
        ),
    )
    assert len(found.lines) == len(oracle)
    assert found.columns == {n: oracle[n].to_pylist() for n in "xyz"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("t,a,", "line 4 has 3"),
        ("t,a,extra", "line 4 has 3"),
        ("t", "line 4 has 1"),
        ("t, with a comma,a", "line 4 has 3"),
        ('"t"x,a', "line 4: a quotation mark there does not pair"),
        ('"t,a', "line 4: a quotation mark there does not pair"),
    ],
)
def test_a_row_that_is_no_row_of_this_table_is_refused_by_its_line(tmp_path, line, says):
    lines = table([*PAIRS, ("quoted, cell", "a")]).splitlines()
    lines.insert(3, line)
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    assert says in refusal(tmp_path / "rows.csv")


def test_two_stray_marks_swallow_no_rows(tmp_path):
    """Read as marks of quotation the lines 3 to 6 would be one row; every line is a row."""
    lines = table().splitlines()
    lines[2], lines[5] = f'"{lines[2]}', lines[5].replace(",", '",')
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    assert "line 3: read with its quotation marks this row ends in line 6" in refusal(
        tmp_path / "rows.csv"
    )
    (tmp_path / "rows.tsv").write_text("\n".join(x.replace(",", "\t") for x in lines) + "\n")
    assert len(rows_of(tmp_path / "rows.tsv")) == 12


QUOTED = {
    "comma": '"a, b and c",flu',
    "lines": '"two\nlines",flu',
    "letter": '"Dear A,\nhello",flu',
}


@pytest.mark.parametrize("elsewhere", QUOTED.values(), ids=QUOTED)
@pytest.mark.parametrize("mark", ",;\t")
@pytest.mark.parametrize("lines", [1, 30])
def test_a_stray_pair_beside_cells_that_need_their_marks_swallows_no_rows(
    tmp_path, elsewhere, mark, lines
):
    """The lines between two stray marks are rows each, and one row where the marks count."""
    rows = [f"patient {i},{('flu', 'asthma', 'cold')[i % 3]}" for i in range(60)]
    rows[2], rows[3] = '"a, b",flu', elsewhere
    rows[10], rows[10 + lines] = '"5 ml at noon,flu', 'height 7",flu'
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["text,label", *rows]).replace(",", mark) + "\n")
    first = 12 + elsewhere.count("\n")
    assert f"line {first}: read with its quotation marks this row ends in line {first + lines}" in (
        refusal(file)
    )
    rows[10], rows[10 + lines] = "5 ml at noon,flu", 'height 7",flu'
    file.write_text("\n".join(["text,label", *rows]).replace(",", mark) + "\n")
    assert len(rows_of(file)) == 60


def test_a_stray_pair_between_texts_is_refused_when_long_and_told_of_when_short(tmp_path):
    rows = [f"question {i},answer {i}" for i in range(60)]
    rows[3] = '"a, b and c",an answer'
    file = tmp_path / "rows.csv"
    found = []
    for last in (12, 40):
        new = [*rows]
        new[10], new[last] = f'"{rows[10]}', rows[last].replace(",", '",')
        file.write_text("\n".join(["text,label", *new]) + "\n")
        try:
            notes = corpus_of(file, "causal-lm", response="label").account.sources[0].notes
            found.append(notes[-1])
        except DataError as e:
            found.append(str(e))
    told, refused = found
    assert told == "1 rows of several lines, 1 of them of lines with 2 fields each, the first " \
        "from 12 to 14"  # fmt: skip
    assert "this row ends in line 42" in refused


def test_a_letter_s_lines_are_one_cell_though_each_holds_one_separator(tmp_path):
    letters = [(f"Dear Ann,\nit is {i}, and\nyours", "ab"[i % 2]) for i in range(6)]
    letters += [(f"Dear Bob,\n{i} came", "ab"[i % 2]) for i in range(6)]
    (tmp_path / "rows.csv").write_text(table([*letters, *PAIRS]))
    assert set(letters) < set(zip(*rows_of(tmp_path / "rows.csv").columns[:2], strict=True))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_files_that_were_put_together_have_one_header(tmp_path, mark, end):
    file = tmp_path / "rows.csv"
    parts = [mark + table(PAIRS[:5]), mark + table(PAIRS[5:]), mark + table(PAIRS[:0])]
    file.write_text("".join(parts).replace("\r\n", end), newline="")
    corpus = corpus_of(file)
    assert corpus.labels == ("a", "b")
    (left,) = corpus.account.sources[0].left
    assert (left.why, left.rows, left.first) == ("that repeat the header", 2, (7, 15))
    assert corpus.account.sources[0].read == 14
    lines = "".join(mark + json.dumps({"text": t, "label": x}) + "\n" for t, x in PAIRS)
    (tmp_path / "rows.jsonl").write_text(lines)
    assert sorted(rows_of(tmp_path / "rows.jsonl").text) == sorted(t for t, _ in PAIRS)


def test_a_row_of_several_lines_is_one_row_and_told_of(tmp_path):
    pairs = [*PAIRS, ("Dear doctor,\n\nwe saw, and\nwrote.\n", "a"), ("last", "b")]
    (tmp_path / "rows.csv").write_text(table(pairs))
    corpus = corpus_of(tmp_path / "rows.csv")
    assert corpus.account.sources[0].read == 14
    assert "1 rows of several lines, the first from 14 to 18" in corpus.account.sources[0].notes
    corpus = corpus_of(tmp_path / "rows.csv", dedupe=True, limit=0)
    assert "Dear doctor,\n\nwe saw, and\nwrote.\n" in rows_of(tmp_path / "rows.csv").text


def test_the_line_of_a_row_after_one_of_several_lines_is_the_file_s(tmp_path):
    pairs = [("one\ntwo, three\nfour", "a"), *PAIRS, ("TEXT 0", "a")]
    (tmp_path / "rows.csv").write_text(table(pairs))
    (source,) = corpus_of(tmp_path / "rows.csv", dedupe=True).account.sources
    assert [(x.rows, x.first) for x in source.left] == [(1, (17,))]


def test_a_cell_may_be_very_long(tmp_path):
    (tmp_path / "rows.csv").write_text(table([*PAIRS, ("long " * 60_000, "a")]))
    assert max(map(len, rows_of(tmp_path / "rows.csv").text)) == 300_000


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label,text\n" + "a,b,c\n" * 9)
    assert "'text' twice" in refusal(tmp_path / "rows.csv")


# -- encodings and archives -----------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding, suffix):
    file = tmp_path / f"rows{suffix}"
    lines = "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in PAIRS)
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    content = (mark + (table() if suffix == ".csv" else lines)).encode(encoding)
    file.write_bytes(content)
    assert sorted(zip(rows_of(file).text, rows_of(file).label, strict=True)) == sorted(PAIRS)


def test_a_byte_that_is_not_of_the_encoding_is_told_by_its_line(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(table([*PAIRS[:3], ("na\u00efve", "a"), *PAIRS]).encode("cp1252"))
    assert "line 5: byte 0xef is not utf-8; set data.encoding" in refusal(file)
    assert "na\u00efve" in rows_of(file, encoding="cp1252").text
    for text in (table(), table([("na\u00efve", "a"), *PAIRS])):
        file.write_bytes(text.encode("utf-16-le"))
        assert "utf-16" in refusal(file)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_an_encoding_under_which_letters_would_be_two_is_refused(tmp_path, encoding):
    file = tmp_path / "rows.csv"
    file.write_text(table([("na\u00efve", "a"), *PAIRS]), encoding="utf-8")
    assert 'set data.encoding = "utf-8"' in refusal(file, encoding=encoding)
    file.write_bytes(table([("na\u00efve", "a"), *PAIRS]).encode(encoding))
    assert "na\u00efve" in rows_of(file, encoding=encoding).text
    file.write_text(table())
    assert len(rows_of(file, encoding=encoding)) == 12


@pytest.mark.parametrize("suffix", ["ndjson", "jsonlines"])
def test_json_lines_have_other_suffixes_too(tmp_path, suffix):
    lines = "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in PAIRS)
    (tmp_path / f"rows.{suffix}").write_text(lines)
    assert len(rows_of(tmp_path / f"rows.{suffix}")) == 12


def zipped(content: bytes, name: str, at: Path) -> None:
    with zipfile.ZipFile(at, "w") as archive:
        archive.writestr(name, content)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress),
                                              (".bz2", bz2.compress)])  # fmt: skip
def test_a_compressed_file_is_read_as_what_it_holds(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    whole = pack(table().encode())
    (tmp_path / f"rows.csv{suffix}").write_bytes(whole)
    assert sorted(rows_of(tmp_path / f"rows.csv{suffix}").text) == sorted(t for t, _ in PAIRS)
    (tmp_path / f"cut.csv{suffix}").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(tmp_path / f"cut.csv{suffix}")


def test_an_archive_holds_one_file(tmp_path):
    lines = "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in PAIRS)
    zipped(lines.encode(), "inner/rows.jsonl", tmp_path / "rows.zip")
    assert len(rows_of(tmp_path / "rows.zip")) == 12
    with zipfile.ZipFile(tmp_path / "rows.zip", "a") as archive:
        archive.writestr("__MACOSX/inner/._rows.jsonl", "x")
        archive.writestr("inner/.DS_Store", "x")
    assert len(rows_of(tmp_path / "rows.zip")) == 12
    with zipfile.ZipFile(tmp_path / "rows.zip", "a") as archive:
        archive.writestr("more.jsonl", lines)
    assert "holds 2 files (inner/rows.jsonl, more.jsonl), must be one" in refusal(
        tmp_path / "rows.zip"
    )
    (tmp_path / "not.zip").write_text("no archive")
    assert "damaged" in refusal(tmp_path / "not.zip")


# -- JSON, Parquet, types -------------------------------------------------------------------------


def test_json_values_are_the_text_that_is_written(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"text": "2024-01-02", "label": 1.50}\n{"text": "2024-01-03T00:00:00Z", "label": 2}\n'
        '{"text": 12345678901234567890123, "label": 1.50}\n{"text": true, "label": 2}\n'
        '{"text": 1e5, "label": 2}\n'
    )
    found = rows_of(file, labels=("1.50", "2"))
    assert set(found.text) == {
        "2024-01-02", "2024-01-03T00:00:00Z", "12345678901234567890123", "true", "1e5"
    }  # fmt: skip
    assert set(found.label) == {"1.50", "2"}


json_values = st.one_of(st.text(max_size=8), st.integers(), st.booleans(), st.none(), st.floats())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), json_values), min_size=1, max_size=6))
def test_json_lines_and_a_json_list_hold_the_same_rows(rows):
    lines = read_json("".join(json.dumps(row) + "\n" for row in rows))
    whole = read_json(json.dumps(rows, indent=1))
    assert (lines.columns, len(lines.lines)) == (whole.columns, len(rows))
    for name, column in lines.columns.items():
        for row, text in zip(rows, column, strict=True):
            value = row.get(name)
            if value is None or value != value:
                assert text is None
            else:
                assert text == (value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not it", "line 3"),
        ("[1, 2]", "line 3: must be an object"),
        ('{"text": "a", "text": "b", "label": "a"}', "line 3: 'text' is there twice"),
        ("[" * 100_000, "line 3"),
        ('{"text": "bad \\ud83d", "label": "a"}', "line 3: half of a surrogate pair"),
    ],
)
def test_a_line_that_is_no_object_is_refused_by_its_number(tmp_path, line, says):
    lines = [json.dumps({"text": t, "label": x}) for t, x in PAIRS]
    lines.insert(2, line)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert says in refusal(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_nested_columns_go_by_dotted_names(tmp_path, kind):
    rows = [{"id": i, "meta": {"label": x, "body": {"text": t}}} for i, (t, x) in enumerate(PAIRS)]
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        Dataset.from_list(rows).save_to_disk(file)
    found = rows_of(file, text="meta.body.text", label="meta.label")
    assert sorted(zip(found.text, found.label, strict=True)) == sorted(PAIRS)
    said = rows_of(file, "causal-lm", prompt="{id}: {meta.body.text}", response="meta.label")
    assert "3: text 3" in said.text
    assert 'did you mean "meta.label"' in refusal(file, text="meta.body.text", label="meta.lable")


@pytest.mark.parametrize(
    "whole",
    [{"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}, {"data": [{"text": "a"}]}],
)
def test_one_object_of_columns_is_refused_with_what_to_write(tmp_path, whole):
    (tmp_path / "rows.json").write_text(json.dumps(whole))
    assert "write one object a row" in refusal(tmp_path / "rows.json")


def test_a_name_that_is_an_object_s_too_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"

    def written(*rows: object) -> Path:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows * 6))
        return file

    mixed = [{"text": "t", "label": "a"}, {"text": "u", "label": {"name": "b"}}]
    assert "'label' is an object in line 2 and none in line 1" in refusal(written(*mixed))
    double = {"text": "t", "label": "a", "meta.label": "b", "meta": {"label": "a"}}
    assert "line 1: 'meta.label' is there as a name and within an object" in refusal(
        written(double)
    )
    rows = [{"text": f"t{i}", "meta": {"label": "ab"[i % 2]} if i else None} for i in range(9)]
    assert len(rows_of(written(*rows), label="meta.label")) == 48
    table = pyarrow.Table.from_pylist([double] * 9)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "'meta.label' is there as a name and within a struct" in refusal(
        tmp_path / "rows.parquet"
    )


@pytest.mark.parametrize("column", [[b"\x00\xff"] * 12, [["a", "b"]] * 12])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_bytes_and_lists_are_refused_by_name(tmp_path, column, kind):
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        lines = [{"text": ["a", "b"], "label": x} for _, x in PAIRS]
        file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    else:
        pyarrow.parquet.write_table(
            pyarrow.table({"text": column, "label": [x for _, x in PAIRS]}), file
        )
    assert 'data.text = "text"' in refusal(file)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "json"])
def test_what_is_missing_is_no_class_in_any_format(tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    missing = {"jsonl": [None, "", "  "], "json": [None, float("nan"), ""],
               "parquet": [None, float("nan"), None], "csv": ["", "nan", "NaN"]}[kind]  # fmt: skip
    label = [1.0, 2.0] * 6 if kind == "parquet" else ["a", "b"] * 6
    rows = [{"text": f"t{i}", "label": x} for i, x in enumerate([*label, *missing])]
    match kind:
        case "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "json":
            file.write_text(json.dumps(rows))
        case "parquet":
            pandas.DataFrame(rows).to_parquet(file)
        case "csv":
            file.write_text(table([(row["text"], row["label"]) for row in rows]))
    corpus = corpus_of(file)
    assert corpus.labels == (("1.0", "2.0") if kind == "parquet" else ("a", "b"))
    assert [(x.why, x.rows) for x in corpus.account.sources[0].left] == [
        ('with nothing in "label"', 3)
    ]


def test_pandas_categories_are_text(tmp_path):
    file = tmp_path / "rows.parquet"
    frame = pandas.DataFrame(PAIRS, columns=["text", "label"])
    frame.astype({"label": "category"}).to_parquet(file)
    assert set(rows_of(file).label) == {"a", "b"}


# -- labels ---------------------------------------------------------------------------------------


def labelled(file: Path, labels: list[str]) -> Path:
    file.write_text(table([(f"t{i}", x) for i, x in enumerate(labels)]))
    return file


def test_numbers_are_classes_only_when_they_are_whole_or_asked_for(tmp_path):
    scores = [f"{i % 10 / 2}" for i in range(60)]
    file = labelled(tmp_path / "rows.csv", scores)
    message = refusal(file)
    assert "10 values from 0.0 to 4.5, which are no classes" in message
    assert 'data.labels = ["0.0", ...]' in message
    stated = tuple(sorted(set(scores), key=float))
    assert corpus_of(file, labels=stated).labels == stated
    whole = labelled(tmp_path / "whole.csv", [str(i % 12) for i in range(60)])
    assert corpus_of(whole).labels == tuple(map(str, range(12)))


@given(st.lists(st.decimals(allow_nan=False, allow_infinity=False, places=2), min_size=1))
def test_numbers_are_in_the_order_of_numbers(numbers):
    found = in_order([str(n) for n in numbers])
    assert [float(x) for x in found] == sorted(float(x) for x in {str(n) for n in numbers})


def test_labels_alike_but_for_case_or_space_are_named_and_mapped(tmp_path):
    countries = ["Benin", "BENIN", "Benin ", "Togo"] * 5 + ["Benin"]
    file = labelled(tmp_path / "rows.csv", countries)
    message = refusal(file)
    assert '"Benin" (11 rows), "BENIN" (5 rows)' in message
    assert 'data.map = ["BENIN=Benin"]' in message
    assert corpus_of(file, map=("BENIN=Benin",)).labels == ("Benin", "Togo")
    assert corpus_of(file, labels=("Togo", "Benin", "BENIN")).labels == ("Togo", "Benin", "BENIN")


@pytest.mark.parametrize(
    ("one", "other", "listed"),
    [
        ("flu", "flu\u200b", r"flu\u200b"),
        ("flu", "\u200eflu", r"\u200eflu"),
        ("flu", "flu\a", r"flu\u0007"),
        ("covid-19", "covid\u201119", None),
        ("covid-19", "covid\u201319", None),
        ("crohn's", "crohn\u2019s", None),
        ("type 1", "type_1", None),
        ("type 1", "type\u00a01", r"type\u00a01"),
        ("-1", "\u22121", None),
        ("1", "+1", None),
        ("5%", "5 %", None),
    ],
)
def test_labels_that_look_the_same_are_named_and_the_map_that_is_printed_mends_them(
    tmp_path, one, other, listed
):
    file = labelled(tmp_path / "rows.csv", [one, other, "cold", one] * 5)
    message = refusal(file)
    assert f'"{one}" (10 rows), "{listed or other}" (5 rows)' in message
    (printed,) = tomllib.loads("map = [" + message.split("data.map = [")[1].split("]")[0] + "]")[
        "map"
    ]
    assert corpus_of(file, map=(printed,)).labels == tuple(sorted((one, "cold")))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["Benin", "B\u00e9nin", "Togo"], 'the labels "Benin", "B\u00e9nin" differ in accents'),
        (["flu", "flu.", "cold"], 'the labels "flu", "flu." differ in accents or punctuation'),
        (["'flu'", "'cold'"], "quotation marks are a part of the label 'cold'"),
        ([*map(str, range(12)), "NA"], 'all labels are numbers but "NA"'),
        (["0", "1", "2", "-1"], '"-1" is a class of its own; where it stands for rows without'),
        (["neutral", "entails", "-"], 'leave these out: data.map = ["-="]'),
        (["-1", "1"], ""),
        (["+", "-", "?"], ""),
        (["+1", "-1", "0"], ""),
        (["<5", ">5"], ""),
    ],
)
def test_labels_that_may_be_a_mistake_are_noted(tmp_path, labels, says):
    corpus = corpus_of(labelled(tmp_path / "rows.csv", labels * 3))
    found = corpus.account.warnings()
    assert says in found[0] if says else not found
    assert not corpus_of(tmp_path / "rows.csv", labels=corpus.labels).account.warnings()


@pytest.mark.parametrize("none", ["-1", "-"])
def test_a_label_that_the_map_makes_nothing_of_leaves_its_rows_out(tmp_path, none):
    file = labelled(tmp_path / "rows.csv", ["0", "1", "2", none] * 4)
    corpus = corpus_of(file, map=(f"{none}=",))
    assert corpus.labels == ("0", "1", "2")
    assert corpus.account.sources[0].left[0].rows == 4
    assert corpus_of(file, map=("1=one", f"{none}= ")).labels == ("0", "2", "one")


def test_a_file_of_words_and_tags_under_another_name_is_told_which_it_must_have(tmp_path):
    file = tmp_path / "train.txt"
    for text in ("-DOCSTART- -X- O\n\nEU B-ORG\nrejects O\n", "EU NNP B-ORG\nrejects VBZ O\n"):
        file.write_text(text)
        assert refusal(file).endswith("a word and its tag a line are read of files named .conll")
    file.write_text("Some words of a text\n")
    assert refusal(file).endswith("set data.separator")


def test_signed_numbers_and_percentages_are_numbers_and_one_without_a_number_is_last(tmp_path):
    assert in_order(["+1", "\u22122", "0", "-1"]) == ("\u22122", "-1", "0", "+1")
    assert in_order(["100%", "5%", "10 %"]) == ("5%", "10 %", "100%")
    assert in_order(["NA", "10", "9", "1"]) == ("1", "9", "10", "NA")
    assert in_order(["10", "9", "low", "high"]) == ("10", "9", "high", "low")
    file = labelled(tmp_path / "rows.csv", [f"{i % 9}.5%" for i in range(60)])
    assert "9 values from 0.5% to 8.5%, which are no classes" in refusal(file)


def test_a_header_is_found_by_what_is_seen_of_it(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(table().replace("label", "label\u200b").replace("text,", "\u200etext,"))
    assert len(rows_of(file)) == 12
    lines = "".join(json.dumps({"text": t, "la\u200bbel": x}) + "\n" for t, x in PAIRS)
    (tmp_path / "rows.jsonl").write_text(lines)
    assert r'did you mean "la\u200bbel"' in refusal(tmp_path / "rows.jsonl")


def test_the_clients_of_a_column_are_told_apart_as_labels_are(tmp_path):
    def of(*sites: str) -> Path:
        rows = [f"t{i},{'ab'[i % 2]},{sites[i % len(sites)]}" for i in range(40)]
        (tmp_path / "rows.csv").write_text("\n".join(["text,label,site", *rows]) + "\n")
        return tmp_path / "rows.csv"

    def clients(file: Path, n: int) -> Corpus:
        how = {"partition": "natural", "natural_column": "site", "test_size": 0}
        return load(DataConfig(path=str(file), **how), "classification", n, 0)

    found = clients(of("Benin", "Benin ", "Togo", "nan"), 2)
    assert [len(c.train) + len(c.test) for c in found.clients] == [20, 10]
    assert found.account.sources[0].left[0].rows == 10
    with pytest.raises(DataError, match=r'nearly the same.*"Benin" \(20 rows\), "BENIN"'):
        clients(of("Benin", "BENIN", "Togo", "Benin"), 2)


def test_a_label_that_data_labels_lacks_is_refused_with_the_one_it_nearly_is(tmp_path):
    file = labelled(tmp_path / "rows.csv", ["yes", "no", "YES"] * 5)
    message = refusal(file, labels=("no", "yes"))
    assert 'label "YES" in 5 rows, which data.labels does not know' in message
    assert 'data.map = ["YES=yes"]' in message


def test_numbered_classes_keep_their_own_order_and_number(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a", "m"])})
    columns = {"text": [f"t{i}" for i in range(12)], "label": [0, 2] * 6}
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    corpus = corpus_of(tmp_path / "saved")
    assert corpus.labels == ("z", "a", "m")
    assert corpus.account.warnings() == []
    assert "no row has the label a" in corpus.account.lines()
    assert corpus_of(tmp_path / "saved", map=("m=y",)).labels == ("z", "a", "y")


def test_labels_with_commas_survive_the_flat_config():
    config = Config.read({"data": {"labels": ["yes, often", "no", " x"], "map": ["a, b=c"]}})
    assert config.data.labels == ("yes, often", "no", " x")
    assert Config.read(config.flat()) == config
    assert Config.read({"data.labels": "a,b"}).flat()["data.labels"] == "a,b"


def test_numbers_with_a_comma_are_numbers_and_one_in_two_forms_is_named(tmp_path):
    assert in_order(["10,5", "2,25", "3"]) == ("2,25", "3", "10,5")
    file = tmp_path / "rows.csv"
    file.write_text("text;label\n" + "".join(f"t{i};{i % 9},5\n" for i in range(40)))
    assert "from 0,5 to 8,5, which are no classes" in refusal(file)
    file = labelled(tmp_path / "two.csv", ["1", "2", "1.0", "02"] * 5)
    assert 'data.map = ["1.0=1", "02=2"]' in refusal(file)


def test_a_table_without_a_header_is_told_to_have_one(tmp_path):
    (tmp_path / "rows.tsv").write_text("".join(f"t{i}\t{i}.5\n" for i in range(9)))
    data = DataConfig(path=str(tmp_path / "rows.tsv"), label="label", partition="iid", test_size=2)
    with pytest.raises(DataError, match="where the first line is a row, put one with the columns'"):
        load(data, "regression", 2, 0)


def test_numbers_to_learn_that_have_a_comma_are_told_of(tmp_path, caplog):
    """A point is what is read, and "1,200" may have been meant as twelve hundred."""
    rows = [f"t{i};{i % 9}{',200' if i % 2 else '.5'}\n" for i in range(40)]
    (tmp_path / "rows.csv").write_text("text;label\n" + "".join(rows))
    data = DataConfig(path=str(tmp_path / "rows.csv"), label="label", partition="iid", test_size=2)
    found = load(data, "regression", 2, 0)
    assert "'1,200' is 1.2" in caplog.text
    assert '20 of 40 numbers in "label" have a comma, which is read as a point' in caplog.text
    assert {"1.2", "2.5"} < {x for c in found.clients for x in c.train.target}


@pytest.mark.parametrize(
    ("start", "says"),
    [(b"PK\x03\x04rest", "Excel"), (b"\x1f\x8brest", "name it .gz"), (b"PAR1", "Parquet")],
)
def test_a_file_that_is_no_text_is_told_what_it_is(tmp_path, start, says):
    (tmp_path / "rows.csv").write_bytes(start)
    assert says in refusal(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_bytes(b"")
    assert "no header line" in refusal(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_bytes(b"text,label\n")
    assert "it has no rows" in refusal(tmp_path / "rows.csv")


def test_a_directory_s_file_of_the_split_is_read_as_it_is_written(tmp_path):
    (tmp_path / "train.csv").write_text(table([(f"0{i}", f"0{i % 2}") for i in range(12)]))
    (tmp_path / "test.csv").write_text(table([(f"u{i}", f"0{i % 2}") for i in range(4)]))
    assert set(rows_of(tmp_path).label) == {"00", "01"}
    assert set(rows_of(tmp_path, split="test").text) == {"u0", "u1", "u2", "u3"}


def test_a_directory_s_files_that_are_not_read_are_named(tmp_path, caplog):
    (tmp_path / "train.csv").write_text(table())
    (tmp_path / "test.csv").write_text(table())
    assert len(rows_of(tmp_path)) == 12
    assert not caplog.messages
    (tmp_path / "train_extra.csv").write_text(table())
    assert len(rows_of(tmp_path)) == 12
    assert "train_extra.csv: not read" in caplog.messages[0]
    lines = "".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in PAIRS)
    (tmp_path / "train.jsonl").write_text(lines)
    assert "holds train.csv and train.jsonl: name the file itself" in refusal(tmp_path)


def test_a_directory_of_two_kinds_of_files_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text(table())
    pandas.DataFrame(PAIRS, columns=["text", "label"]).to_parquet(tmp_path / "b.parquet")
    message = refusal(tmp_path)
    assert "a.csv" in message
    assert "b.parquet" in message


def test_a_parquet_file_without_rows_or_with_a_name_twice_is_told_of(tmp_path):
    none = pyarrow.table(
        {"text": pyarrow.array([], "string"), "label": pyarrow.array([], "string")}
    )
    pyarrow.parquet.write_table(none, tmp_path / "rows.parquet")
    assert "it has no rows" in refusal(tmp_path / "rows.parquet")
    columns = [pyarrow.array(["a", "b"])] * 3
    double = pyarrow.Table.from_arrays(columns, ["text", "label", "label"])
    pyarrow.parquet.write_table(double, tmp_path / "rows.parquet")
    assert "the column 'label' twice" in refusal(tmp_path / "rows.parquet")
