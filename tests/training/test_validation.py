"""Validation rows: apart from what trains and what tests, accounted for, and off by default."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.reader import Config
from fedlora.config.sections import DataConfig
from fedlora.errors import ConfigError, DataError
from fedlora.federation.client.admit import admit
from fedlora.training.begun_with import digest_of_rows
from fedlora.training.data import corpus as corpus_module
from fedlora.training.data.corpus import Corpus, Rows
from tests.support.by_task import load, load_node

ROWS: list[dict[str, object]] = [
    {"text": f"text {i}", "label": "abc"[i % 3], "who": f"w{i % 4}"} for i in range(100)
]
OWN = {"client_validation_fraction": 0.2}


def jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def of(tmp_path: Path, rows: list[dict[str, object]] = ROWS, **more: object) -> DataConfig:
    given = {"path": jsonl(tmp_path / "rows.jsonl", rows), "test_size": 10, "partition": "iid"}
    return DataConfig(**{**given, **more})  # type: ignore[arg-type]


def texts(rows: Rows) -> set[str]:
    """The test's own idea of which rows are equal."""
    return {" ".join(x.lower().split()) for x in rows.text}


def straddling(corpus: Corpus) -> set[str]:
    """Texts that validate, and train or test as well."""
    others = [corpus.test, *(p for c in corpus.clients for p in (c.train, c.test))]
    mine = [corpus.validation, *(c.validation for c in corpus.clients)]
    return set[str]().union(*map(texts, mine)) & set[str]().union(*map(texts, others))


def summed(corpus: Corpus) -> int:
    """Rows left out and rows in use, counted from the account and the corpus apart."""
    left = sum(x.rows for s in corpus.account.sources for x in s.left)
    parts = [corpus.test, corpus.validation]
    parts += [p for c in corpus.clients for p in (c.train, c.test, c.validation)]
    return left + sum(map(len, parts))


@pytest.mark.parametrize(("size", "rows"), [(20, 20), (0.1, 9), (0.001, 1), (1, 1)])
def test_a_size_is_a_number_of_rows_or_a_share_of_what_the_test_leaves(tmp_path, size, rows):
    corpus = load(of(tmp_path, validation_size=size), "classification", 3, 0)
    assert (len(corpus.test), len(corpus.validation)) == (10, rows)
    assert sum(len(c.train) + len(c.test) for c in corpus.clients) == 90 - rows
    assert not straddling(corpus)


def test_a_size_that_is_neither_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a whole number, or below 1 a share"):
        Config.read({"data.validation-size": 1.5})


def test_without_validation_every_row_is_where_it_was(tmp_path):
    """The digest was written down before there were such rows."""
    corpus = load(of(tmp_path), "classification", 3, 0)
    parts = [corpus.test, *(p for c in corpus.clients for p in (c.train, c.test))]
    held = [*corpus.held, *(p for c in corpus.clients for p in c.parts)]
    assert digest_of_rows(held) == digest_of_rows(parts) == "bba815d18ac4ce8f"
    assert not any("validat" in x for x in list(corpus.account.lines())[1:])
    assert not {"validation", "validated"} & corpus.account.record().keys()


def test_the_central_test_is_the_same_with_validation_rows_and_without(tmp_path):
    data = of(tmp_path)
    with_them = load(of(tmp_path, validation_size=0.2, **OWN), "classification", 3, 0)
    assert load(data, "classification", 3, 0).test == with_them.test


def test_each_client_holds_out_its_share_of_what_its_own_test_leaves(tmp_path):
    corpus = load(of(tmp_path, **OWN), "classification", 3, 0)
    assert [(len(c.train), len(c.test), len(c.validation)) for c in corpus.clients] == [
        (22, 3, 5), (22, 3, 5), (22, 3, 5)
    ]  # fmt: skip
    assert not straddling(corpus)
    assert corpus.account.validated == tuple(
        {x: Counter(c.validation.label)[x] for x in "abc"} for c in corpus.clients
    )
    (line,) = (x for x in corpus.account.lines() if "rows read =" in x)
    assert line.endswith("66 training + 9 clients' own test + 15 clients' own validation")


def test_a_client_of_few_rows_keeps_one_to_train_on(tmp_path):
    rows = load_node(of(tmp_path, path="", node_path=jsonl(tmp_path / "n.jsonl", ROWS[:2]), **OWN),
                     "classification", ("a", "b"))  # fmt: skip
    assert (len(rows.train), len(rows.test), len(rows.validation)) == (1, 1, 0)


@pytest.mark.parametrize("seed", range(8))
def test_no_label_ends_among_the_validation_rows_alone(tmp_path, seed):
    rows = [{**row, "label": "rare" if i < 3 else "ab"[i % 2]} for i, row in enumerate(ROWS)]
    data = of(tmp_path, rows, validation_size=20, test_size=20, **OWN)
    corpus = load(data, "classification", 3, seed)
    assert any("rare" in c.train.label for c in corpus.clients)
    assert corpus.account.warnings() == []
    assert summed(corpus) == 100


drawn = st.lists(st.tuples(st.integers(0, 25), st.sampled_from("abc")), min_size=40, max_size=80)


@settings(max_examples=30, deadline=None)
@given(drawn, st.booleans(), st.sampled_from([0, 0.2, 5]), st.sampled_from([0.0, 0.3]))
def test_duplicates_never_straddle_and_every_row_is_accounted_for(
    tmp_path_factory, rows, dedupe, size, share
):
    folder = tmp_path_factory.mktemp("rows")
    written = [{"text": f"T{n} " if n % 2 else f"t{n}", "label": x} for n, x in rows]
    data = of(folder, written, dedupe=dedupe, test_size=5, validation_size=size,
              client_validation_fraction=share)  # fmt: skip
    try:
        corpus = load(data, "classification", 2, 0)
    except DataError as e:
        if "fault of fedlora" in str(e):
            raise
        return
    assert not straddling(corpus)
    assert corpus.account.sources[0].read == len(rows) == summed(corpus)
    (line,) = (x for x in corpus.account.lines() if "rows read =" in x)
    total, *parts = (int(x) for x in line.replace("=", " ").split() if x.isdigit())
    assert total == sum(parts) == len(rows)


def test_without_the_last_step_equal_rows_would_straddle(tmp_path, monkeypatch):
    """What the test above sees: kept duplicates, and a split that takes no notice of them."""
    rows = [{"text": f"t{i % 20}", "label": "ab"[i % 2]} for i in range(100)]
    data = of(tmp_path, rows, dedupe=False, **OWN)
    assert not straddling(load(data, "classification", 2, 0))
    monkeypatch.setattr(corpus_module, "apart", lambda _, found, clients, __: (found, clients))
    assert straddling(load(data, "classification", 2, 0))


def test_rows_of_a_validation_source_leave_the_clients_and_test_rows_leave_it(tmp_path):
    held = jsonl(tmp_path / "held.jsonl", [ROWS[4], ROWS[9], {"text": "new", "label": "a"}])
    test = jsonl(tmp_path / "test.jsonl", [{**ROWS[9], "text": "TEXT  9"}])
    data = of(tmp_path, validation_path=held, test_path=test, test_size=0)
    corpus = load(data, "classification", 3, 0)
    assert sorted(corpus.validation.text) == ["new", "text 4"]
    left = {x.why: x.first for s in corpus.account.sources for x in s.left}
    assert left["also in the validation rows"] == (5,)
    assert left["held out to validate, and also in a test"] == (2,)
    assert not straddling(corpus)
    assert summed(corpus) == 104


def test_sites_that_share_a_row_do_not_straddle(tmp_path):
    sites = [{"path": jsonl(tmp_path / f"{i}.jsonl", ROWS[30 * i : 30 * i + 40])} for i in (0, 1)]
    data = of(tmp_path, path="", clients=sites, validation_size=8, dedupe=False, **OWN)
    corpus = load(data, "classification", 2, 0)
    assert len(corpus.validation)
    assert not straddling(corpus)
    assert summed(corpus) == 80


def test_a_node_s_directory_has_validation_rows_of_its_own(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS[:10])
    jsonl(tmp_path / "test.jsonl", ROWS[8:12])
    jsonl(tmp_path / "validation.jsonl", [*ROWS[:2], ROWS[8], *ROWS[12:14]])
    data = DataConfig(node_path=str(tmp_path), **OWN)
    rows = load_node(data, "classification", ("a", "b", "c"))
    assert sorted(rows.validation.text) == ["text 0", "text 1", "text 12", "text 13"]
    assert (len(rows.train), len(rows.test)) == (6, 4)
    without = load_node(replace_fraction(data), "classification", ("a", "b", "c"))
    assert (len(without.train), len(without.validation)) == (8, 0)


def replace_fraction(data: DataConfig) -> DataConfig:
    return data.model_copy(update={"client_validation_fraction": 0.0})


def test_what_a_node_validates_on_is_its_own_affair() -> None:
    assert "data.client-validation-fraction" in admit.__globals__["OWN"]


def test_more_than_there_is_is_refused(tmp_path):
    with pytest.raises(DataError, match="leaves the clients nothing of the 90 rows that are no"):
        load(of(tmp_path, validation_size=90), "classification", 3, 0)


def test_a_row_that_validates_and_is_lost_is_an_internal_error(tmp_path, monkeypatch):
    whole = corpus_module.apart
    monkeypatch.setattr(
        corpus_module, "apart",
        lambda *args: (whole(*args)[0].select([0]), whole(*args)[1]),
    )  # fmt: skip
    with pytest.raises(DataError, match="fault of fedlora"):
        load(of(tmp_path, validation_size=5), "classification", 3, 0)


def test_parts_are_two_without_validation_rows_and_three_with() -> None:
    rows = Rows(("a",), ("x",))
    found = corpus_module.ClientRows(rows, rows)
    assert len(found.parts) == 2
    assert len(replace(found, validation=rows).parts) == 3
