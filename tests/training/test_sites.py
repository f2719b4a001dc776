"""data.clients: one file a client, each with its own columns, labels, separator and encoding."""

import json
from pathlib import Path

import pytest

from fedlora import preflight
from fedlora.config.reader import Config, parse_overrides
from fedlora.errors import ConfigError, DataError
from fedlora.training.data.corpus import Corpus
from tests.support.by_task import load

NOTES = {
    "flu": "Fieber und Husten, seit {} Tagen; Grippe",
    "asthma": "wheezing, short of breath for {} days",
    "fracture": "fell; the wrist hurts since {} days",
}


def hospital(at: Path) -> list[dict[str, object]]:
    """Three sites' CSVs as hospitals export them, and the table of data.clients that reads them."""
    at.mkdir(exist_ok=True)
    rows = [(NOTES[x].format(f"{i}{site}"), x) for site in "abc" for i in range(8) for x in NOTES]
    north, south, west = rows[:24], rows[24:48], rows[48:]
    lines = ["Befund;Diagnose;Alter", *(f'"{t} \u00fc";{x.upper()};5{i}' for i, (t, x) in
                                         enumerate(north))]  # fmt: skip
    (at / "north.csv").write_bytes("\r\n".join(lines).encode("latin-1"))
    lines = ["id,note,dx", *(f'{i},"said ""{t}""\nand left",{x} ' for i, (t, x) in
                             enumerate(south))]  # fmt: skip
    (at / "south.csv").write_text("\n".join(lines) + "\n")
    lines = ["text;label", *(f'"{t}";{x}' for t, x in west), '"no label yet";']
    (at / "west.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    upper = [f"{x.upper()}={x}" for x in NOTES]
    return [
        {"path": str(at / "north.csv"), "text": "Befund", "label": "Diagnose", "map": upper,
         "encoding": "latin-1"},
        {"path": str(at / "south.csv"), "text": "note", "label": "dx", "rank": 2},
        {"path": str(at / "west.csv")},
    ]  # fmt: skip


def config_of(sites: object, **changes: object) -> Config:
    given = {"data.clients": sites, "clients.count": 3, "data.test-size": 9}
    return Config.read({**given, **{k.replace("__", "."): v for k, v in changes.items()}})


def corpus_of(config: Config) -> Corpus:
    return load(config.data, config.model.task, config.clients.count, config.run.seed)


def test_a_hospital_s_three_files_are_read_as_each_was_written(tmp_path):
    corpus = corpus_of(config_of(hospital(tmp_path)))
    assert corpus.labels == ("asthma", "flu", "fracture")
    assert len(corpus.test) == 9
    for client, site in zip(corpus.clients, "abc", strict=True):
        texts = client.train.text + client.test.text
        assert texts
        assert all(f"{site} " in text for text in texts)
    assert all(t.endswith(" \u00fc") for t in corpus.clients[0].train.text)
    assert all(t.startswith('said "') and "\nand" in t for t in corpus.clients[1].train.text)
    assert [s.read for s in corpus.account.sources] == [24, 24, 25]
    assert [s.notes[0] for s in corpus.account.sources] == [
        "separator semicolon, found", "separator comma, found", "separator semicolon, found"
    ]  # fmt: skip
    (left,) = corpus.account.sources[2].left
    assert (left.why, left.first) == ('with nothing in "label"', (26,))
    said = "\n".join(corpus.account.lines())
    for i, name in enumerate(("north", "south", "west")):
        n = len(corpus.clients[i].train)
        assert f"client {i}, {tmp_path / name}.csv: {n} training" in said


@pytest.mark.parametrize("how", ["*.csv", "", "[012].csv"])
def test_a_pattern_or_a_directory_is_a_client_for_each_file(tmp_path, how):
    for i in range(3):
        lines = [f"{'ab'[n % 2]},site {i} text {n}" for n in range(12)]
        (tmp_path / f"{i}.csv").write_text("\n".join(["label,text", *lines]))
    (tmp_path / "README.md").write_text("no rows")
    corpus = corpus_of(config_of(str(tmp_path / how)))
    assert [{t[:6] for t in c.train.text} for c in corpus.clients] == [
        {"site 0"}, {"site 1"}, {"site 2"}
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"3 sites.*clients\.count must be 3, is 4"):
        corpus_of(config_of(str(tmp_path / how), clients__count=4))
    with pytest.raises(DataError, match=r'data\.clients\[0\] = ".*none\*": no file there'):
        corpus_of(config_of(str(tmp_path / "none*")))


def test_sites_survive_the_flat_config_the_file_and_an_override(tmp_path):
    sites = hospital(tmp_path)
    config = config_of(sites)
    assert config.data.clients[1].rank == 2
    assert all(isinstance(v, bool | int | float | str) for v in config.flat().values())
    assert Config.read(config.flat()) == config
    (tmp_path / "config.toml").write_text(config.toml())
    assert Config.load(tmp_path / "config.toml") == config
    tables = "".join(
        "[[data.clients]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in site.items())
        for site in sites
    )
    (tmp_path / "mine.toml").write_text(f"[data]\ntest-size = 9\n{tables}[clients]\ncount = 3\n")
    assert Config.load(tmp_path / "mine.toml") == config
    told = parse_overrides(['data.clients=[{path = "a.csv", label = "x"}, "b.csv"]'])
    assert [s.path for s in Config.read(told).data.clients] == ["a.csv", "b.csv"]
    told = parse_overrides(["data.clients=sites/*.csv"])
    assert [s.path for s in Config.read(told).data.clients] == ["sites/*.csv"]


@pytest.mark.parametrize(
    ("sites", "says"),
    [
        ([{"path": "a.csv", "lable": "x"}], r"data\.clients\[0\]\.lable"),
        ([{"label": "x"}], r"data\.clients\[0\]\.path"),
        ([{"path": "a.csv", "rank": "4"}], r"data\.clients\[0\]\.rank"),
        ("[{not json", r"data\.clients.*JSON list of tables"),
        (7, r"data\.clients"),
    ],
)
def test_a_wrong_table_is_told_by_its_place(sites, says):
    with pytest.raises(ConfigError, match=says):
        Config.read({"data.clients": sites})


def test_a_row_of_two_sites_is_left_out_once_and_counted(tmp_path):
    for i in range(3):
        lines = [f"{'ab'[n % 2]},site {i} text {n}" for n in range(12)]
        (tmp_path / f"{i}.csv").write_text("\n".join(["label,text", *lines, "a,THE same"]))
    corpus = corpus_of(config_of(str(tmp_path)))
    assert [[(x.why, x.rows) for x in s.left] for s in corpus.account.sources] == [
        [],
        [("equal to a row of another source", 1)],
        [("equal to a row of another source", 1)],
    ]


def test_labels_that_two_sites_write_in_two_ways_are_named(tmp_path):
    sites = hospital(tmp_path)
    del sites[0]["map"]
    with pytest.raises(DataError, match=r'"FLU=flu"'):
        corpus_of(config_of(sites))
    stated = config_of(sites, data__labels=["flu", "asthma", "fracture"])
    with pytest.raises(DataError, match=r'north\.csv has the label "FLU".*data\.map = \["FLU=flu"'):
        corpus_of(stated)


def test_a_site_with_too_few_rows_is_named(tmp_path):
    sites = hospital(tmp_path)
    Path(str(sites[2]["path"])).write_text("text;label\nalone;flu\n")
    with pytest.raises(DataError, match=r"client 2, .*west\.csv, has \d rows left and needs 2"):
        corpus_of(config_of(sites))


def test_what_does_not_go_with_sites_is_refused(tmp_path):
    sites = hospital(tmp_path)
    for change, says in (
        ({"data__path": "rows.csv"}, "leave out data.path"),
        ({"ranks__policy": "share"}, "ranks.policy = 'share'"),
        ({"lora__form": "vera", "clients__ranks": "4"}, "leave out each site's rank"),
    ):
        problems = preflight.problems(config_of(sites, **change))
        assert any(says in problem for problem in problems)


def three(at: Path) -> str:
    for i, words in enumerate(["flu,cold", "Flu,cold", "flu,COLD"]):
        lines = [f"{words.split(',')[n % 2]},site {i} text {n}" for n in range(12)]
        (at / f"{i}.csv").write_text("\n".join(["label,text", *lines]))
    return str(at / "*.csv")


def test_a_common_map_must_find_each_of_its_values_at_some_site(tmp_path):
    sites = three(tmp_path)
    good = corpus_of(config_of(sites, data__map=["Flu=flu", "COLD=cold"]))
    assert good.labels == ("cold", "flu")
    with pytest.raises(
        DataError, match=r'data\.map: "Cold" is no value .*; near it is "cold" \(18 rows\); it has'
    ):
        corpus_of(config_of(sites, data__map=["Flu=flu", "COLD=cold", "Cold=cold"]))


def test_a_site_s_own_map_must_find_its_values_at_that_site(tmp_path):
    three(tmp_path)
    sites = [{"path": str(tmp_path / f"{i}.csv")} for i in range(3)]
    sites[0] |= {"map": ["Flu=flu"]}
    says = r'data\.clients\[0\]\.map: "Flu" is no value .*near it is "flu" \(6 rows\)'
    with pytest.raises(DataError, match=says):
        corpus_of(config_of(sites, data__map=["Flu=flu", "COLD=cold"]))


def test_labels_that_are_stated_and_that_no_row_has_are_warned_of(tmp_path, caplog):
    for i in range(3):
        lines = [f"{'ab'[n % 2]},site {i} text {n}" for n in range(12)]
        (tmp_path / f"{i}.csv").write_text("\n".join(["label,text", *lines]))
    corpus = corpus_of(config_of(str(tmp_path), data__labels=["a", "b", "c"]))
    assert corpus.account.warnings() == ['data.labels names "c", and no row has it.']
    assert 'data.labels names "c"' in caplog.text
    assert corpus_of(config_of(str(tmp_path), data__labels=["a", "b"])).account.warnings() == []
