"""Every row that is read is accounted for: left out for which reason, or in which part."""

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data.account import Book
from fedlora.training.data.corpus import ClientRows, Corpus, Rows
from fedlora.training.data.splits import keep_each_label
from tests.support.by_task import load, load_node


def jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def summed(corpus: Corpus) -> int:
    """Rows left out and rows in use, counted from the account and the corpus apart."""
    left = sum(x.rows for s in corpus.account.sources for x in s.left)
    parts = [corpus.test, *(p for c in corpus.clients for p in (c.train, c.test))]
    return left + sum(map(len, parts))


def left_out(corpus: Corpus, source: int = 0) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {x.why: (x.rows, x.first) for x in corpus.account.sources[source].left}


def messy(path: Path) -> str:
    """43 lines: 40 rows of a and b, one without text, one without label, one that is there."""
    rows: list[dict[str, object]] = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(40)]
    rows.insert(3, {"text": " ", "label": "a"})  # line 4
    rows.insert(7, {"text": "unlabelled", "label": ""})  # line 8
    rows.append({"text": "T0", "label": "a"})  # line 43
    return jsonl(path, rows)


def test_each_row_left_out_has_its_reason_and_its_line(tmp_path):
    test = jsonl(tmp_path / "test.jsonl", [{"text": "t5", "label": "b"}])
    data = DataConfig(path=messy(tmp_path / "a.jsonl"), test_path=test, limit=30, partition="iid")
    corpus = load(data, "classification", 2, 0)
    found = left_out(corpus)
    assert found['with nothing in "text"'] == (1, (4,))
    assert found['with nothing in "label"'] == (1, (8,))
    assert found["equal to an earlier row"] == (1, (43,))
    assert found["beyond data.limit"][0] == 10
    assert [s.read for s in corpus.account.sources] == [43, 1]
    assert summed(corpus) == 44


def test_a_line_that_no_pattern_matches_is_accounted_for_by_its_number(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("# head\n\n" + "".join(f"{'ab'[i % 2]} t{i}\n" for i in range(20)) + "# end\n")
    data = DataConfig(
        path=str(file), line_pattern=r"(?P<label>[ab]) (?P<text>\S+)", test_size=4, partition="iid"
    )
    corpus = load(data, "classification", 2, 0)
    assert left_out(corpus) == {"that data.line-pattern does not match": (2, (1, 23))}
    assert summed(corpus) == 22


def test_rows_of_the_central_test_leave_the_clients_with_their_lines(tmp_path):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(20)]
    test = jsonl(tmp_path / "test.jsonl", [rows[4], rows[9]])
    data = DataConfig(path=jsonl(tmp_path / "a.jsonl", rows), test_path=test, partition="iid")
    assert left_out(load(data, "classification", 2, 0)) == {
        "also in the central test": (2, (5, 10))
    }


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["a", "b", "c", "", " "])), min_size=30),
    st.integers(0, 40),
    st.sampled_from(["iid", "dirichlet", "pathological"]),
    st.booleans(),
)
def test_whatever_the_rows_each_is_left_out_or_in_one_place(
    tmp_path_factory, drawn, limit, partition, dedupe
):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    source = jsonl(path, [{"text": f"t{n}", "label": label} for n, label in drawn])
    data = DataConfig(path=source, limit=limit, partition=partition, dedupe=dedupe, test_size=3)
    try:
        corpus = load(data, "classification", 2, 0)
    except DataError as e:
        if "fault of fedlora" in str(e):
            raise
        return
    assert corpus.account.sources[0].read == len(drawn) == summed(corpus)
    trained = Counter(label for c in corpus.clients for label in c.train.label)
    assert {k: sum(c[k] for c in corpus.account.train) for k in corpus.labels} == {
        k: trained[k] for k in corpus.labels
    }


def test_a_row_that_is_lost_or_doubled_is_an_internal_error():
    book = Book()
    numbers = book.read("a.csv", range(1, 5), "line")
    rows = Rows(("a", "b", "c", "d"), ("x", "y", "x", "y"), number=numbers)
    whole = ClientRows(rows.select([0, 1]), rows.select([2, 3]))
    assert book.close(("x", "y"), Rows(), [whole]).sources[0].used == 4
    for wrong in (
        replace(whole, test=rows.select([2])),
        replace(whole, test=rows.select([2, 3, 3])),
        replace(whole, test=rows.select([2, 0])),
    ):
        with pytest.raises(DataError, match="fault of fedlora"):
            book.close(("x", "y"), Rows(), [wrong])


# -- no label ends without a training row ---------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_limit_leaves_each_label_a_training_row(tmp_path, seed):
    rows = [{"text": f"t{i}", "label": "rare" if i < 3 else "ab"[i % 2]} for i in range(1000)]
    source = jsonl(tmp_path / "a.jsonl", rows)
    data = DataConfig(path=source, limit=100, test_size=50, alpha=5.0)
    corpus = load(data, "classification", 4, seed)
    assert any("rare" in c.train.label for c in corpus.clients)
    assert (len(corpus.test), summed(corpus)) == (50, 1000)
    assert sum(len(c.train) + len(c.test) for c in corpus.clients) == 50
    assert corpus.account.warnings() == []


def test_a_label_that_a_limit_has_no_room_for_is_named(tmp_path, caplog):
    rows = [{"text": f"t{i}", "label": "abcdefgh"[i % 8]} for i in range(80)]
    data = DataConfig(path=jsonl(tmp_path / "a.jsonl", rows), limit=6, test_size=2, partition="iid")
    with caplog.at_level(logging.WARNING):
        corpus = load(data, "classification", 1, 0)
    (warning,) = corpus.account.warnings()
    lost = set("abcdefgh") - set(corpus.clients[0].train.label)
    assert len(lost) >= 5
    assert all(f'"{name}"' in warning for name in lost)
    assert warning in caplog.text


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=30), st.data())
def test_an_exchange_moves_rows_only_where_a_label_would_be_lost(labels, data):
    n = data.draw(st.integers(0, len(labels)))
    short, long = list(range(n)), list(range(n, len(labels)))
    keep_each_label(labels, short, long)
    assert sorted(short + long) == list(range(len(labels)))
    assert len(short) == n
    before = set(labels[:n])
    if before == set(labels):
        assert short == list(range(n))
    if n >= len(set(labels)):
        assert {labels[i] for i in short} == set(labels)


def test_a_client_without_a_label_is_counted_not_warned_of(tmp_path):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(40)]
    data = DataConfig(path=jsonl(tmp_path / "a.jsonl", rows), partition="pathological",
                      classes_per_client=1, test_size=4)  # fmt: skip
    account = load(data, "classification", 2, 0).account
    assert account.unseen == {0: ["b"], 1: ["a"]}
    assert account.warnings() == []
    assert any("2 of 2 clients have no training row of some label" in x for x in account.lines())


def test_a_node_tells_its_log_what_became_of_its_rows(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_node(DataConfig(node_path=messy(tmp_path / "a.jsonl")), "classification", ("a", "b"))
    assert "43 rows read; 1 with nothing in" in caplog.text
    assert (
        "43 rows read = 3 left out + 0 central test + 36 training + 4 clients' own" in caplog.text
    )


def test_an_equal_text_of_another_label_is_counted_apart(tmp_path):
    rows: list[dict[str, object]] = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(20)]
    rows += [{"text": "T1 ", "label": "a"}, {"text": "t2", "label": "a"}]
    data = DataConfig(path=jsonl(tmp_path / "a.jsonl", rows), test_size=4, partition="iid")
    assert left_out(load(data, "classification", 2, 0)) == {
        "equal to an earlier row, with another label": (1, (21,)),
        "equal to an earlier row": (1, (22,)),
    }


def test_equal_rows_that_are_kept_are_counted_where_they_matter(tmp_path):
    rows = [{"text": "same", "label": "a"}] * 30 + [
        {"text": f"t{i}", "label": "b"} for i in range(9)
    ]
    source = jsonl(tmp_path / "a.jsonl", rows)
    data = DataConfig(path=source, test_size=8, partition="iid", dedupe=False)
    corpus = load(data, "classification", 2, 0)
    n = sum(c.train.text.count("same") for c in corpus.clients)
    assert "same" in corpus.test.text
    assert f"{n} training rows equal a test row" in corpus.account.lines()
    assert f"{n} training rows equal one of another client" in corpus.account.lines()
    again = load(data.model_copy(update={"dedupe": True, "test_size": 2}), "classification", 2, 0)
    assert not any("training rows equal" in line for line in again.account.lines())


def test_a_node_s_test_rows_are_not_trained_on(tmp_path):
    rows: list[dict[str, object]] = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(10)]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "test.jsonl", [{**rows[3], "text": "T3"}, rows[4]])
    found = load_node(DataConfig(node_path=str(tmp_path)), "classification", ("a", "b"))
    assert (len(found.train), len(found.test)) == (8, 2)
    jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(DataError, match="all its rows are in"):
        load_node(DataConfig(node_path=str(tmp_path)), "classification", ("a", "b"))
