"""The privacy lab: its table in an experiment's file, what the server sees, and going on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, FedLoraError
from fedlora.launch.lab.page import write
from fedlora.launch.lab.plan import Lab, LabSize
from fedlora.launch.lab.seat import Seat, joined
from fedlora.launch.lab.study import PARTS, main
from fedlora.training import cache
from tests.support.private_setting import Build

TINY = LabSize(40, 4, 2.0, (4,), 1, 5, (12,), 2000, 60, 20, 0.95, 7, 5, 32)


def experiment(tmp_path: Path, settings: Build, **table: object) -> Path:
    given = settings(
        "bert", **{
            "run.name": "tiny", "run.rounds": 1, "clients.count": 3, "clients.ranks": "3",
            "train.steps": 1, "model.pooling": "mean", "model.dropout": 0.0,
            "privacy.sample-rate": 1.0, "privacy.delta": 1e-3, "train.optimizer": "sgd",
        },
    )  # fmt: skip
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps({**given, "audit": table}))
    return path


def test_every_run_of_the_shipped_lab_is_a_valid_config_and_differs_where_its_table_says() -> None:
    lab = Lab.load("privacy", {}, Path("out"))
    runs = {(s, e): lab.at(s, e) for s in lab.strategies for e in lab.epsilons}
    assert set(lab.strategies) == {"fedavg", "ffa", "fedex", "flora", "fedsa", "fedsb"}
    assert list(lab.epsilons) == [0, 8, 3, 1]
    for (strategy, epsilon), config in runs.items():
        assert config.strategy.name == strategy
        assert config.privacy.epsilon == epsilon
        assert config.model.pooling == "mean"
    assert [lab.language(e).model.task for e in lab.epsilons] == ["causal-lm"] * 4
    for key, value in lab.table["open"].items():
        assert runs["fedavg", 0].flat()[key] == value


def test_a_wrong_table_is_an_error_that_says_so(tmp_path: Path, settings: Build) -> None:
    with pytest.raises(ConfigError, match=r"audit\.seed: must be one of"):
        Lab.load(experiment(tmp_path, settings, seed=[1]), {}, tmp_path)
    with pytest.raises(ConfigError, match="--strategies: fedavq is none of"):
        Lab.load(experiment(tmp_path, settings), {}, tmp_path, strategies=["fedavq"])


def test_the_lab_measures_every_part_and_goes_on_where_it_was(
    tmp_path: Path, settings: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    speaks = settings("gpt2", **{"data.prompt": "label", "data.response": "text"})
    own = ("model.path", "model.task", "data.prompt", "data.response", "lora.target-modules")
    language = {"model.pooling": "default", **{key: speaks[key] for key in own}}
    table = {"epsilons": [0, 8], "strategies": ["fedavg", "fedsb"], "language": language}
    path = experiment(tmp_path, settings, **table)
    lab = Lab.load(path, {}, tmp_path / "out")
    lab.size = TINY
    page = main(lab, 1, "fedlora privacy audit tiny.toml")
    for part in PARTS:
        rows = lab.rows(part)
        assert rows, part
        assert len(rows) == sum(m.part == part for m in lab.measurements())
    assert all(r["no DP"] == 1.0 and r["epsilon 8"] == 0.0 for r in lab.rows("inversion"))
    assert all(r["AUC"] != 0.5 for r in lab.rows("seat"))
    text = page.read_text()
    assert all(title in text for title in ("Utility", "Membership, from models", "inversion"))
    assert text.count("data:image/png") == 5
    assert "http://" not in text
    capsys.readouterr()
    first = next(m for m in lab.measurements() if m.part == "utility")
    lab.file(first).unlink()
    others = [m for m in lab.measurements() if m != first]
    stamps = {m.name: lab.file(m).stat().st_mtime_ns for m in others}
    main(lab, 1, "")
    assert {n: (tmp_path / "out/rows" / f"{n}.json").stat().st_mtime_ns for n in stamps} == stamps
    assert lab.row(first) is not None
    assert f"[1/1] {first.name}" in capsys.readouterr().out


def test_no_two_measurements_share_a_runs_directory() -> None:
    lab = Lab.load("privacy", {}, Path("out"))
    whole = [lab.whole(*m.labels.values()) for m in lab.measurements() if m.part == "one-run"]
    rest = [lab.at(s, e, n) for n in lab.seeds for s in lab.strategies for e in lab.epsilons]
    names = [config.run.name for config in (*whole, *rest)]
    assert len({*names}) == len(names) == 6 + 48


def test_a_smoke_test_of_the_shipped_experiment_measures_its_language_model(tmp_path: Path) -> None:
    lab = Lab.load("privacy", {}, tmp_path, quick=True, only=("language",))
    main(lab, 1, "")
    for row in lab.rows("language"):
        assert {"loss AUC", "min-k AUC", "reference AUC"} <= {*row}
    assert len(lab.rows("language")) == len(lab.epsilons)


@pytest.mark.slow
def test_a_smoke_test_of_the_shipped_experiment_measures_everything(tmp_path: Path) -> None:
    given = ["privacy", "audit", "privacy", "--quick", "--workers", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "fedlora.cli", *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not measured" not in done.stdout + done.stderr
    lab = Lab.load("privacy", {}, tmp_path, quick=True)
    assert all(lab.row(m) for m in lab.measurements())


def test_a_directory_of_another_experiment_is_refused(tmp_path: Path, settings: Build) -> None:
    path = experiment(tmp_path, settings, epsilons=[0], strategies=["fedavg"])
    Lab.load(path, {}, tmp_path / "out").open()
    Lab.load(path, {}, tmp_path / "out").open()
    with pytest.raises(FedLoraError, match="another experiment"):
        Lab.load(path, {"train.lr": 0.5}, tmp_path / "out").open()


@pytest.mark.parametrize("quick", [True, False])
def test_the_page_of_a_smoke_test_says_that_it_is_one(
    tmp_path: Path, settings: Build, quick: bool
) -> None:
    path = experiment(tmp_path, settings, epsilons=[0, 8], strategies=["fedavg"])
    lab = Lab.load(path, {}, tmp_path / "out", quick)
    lab.open()
    text = write(lab, "fedlora privacy audit").read_text()
    assert ("A smoke test, --quick: every part runs" in text) is quick
    assert ("(smoke test)" in (tmp_path / "out/privacy.md").read_text()) is quick


def test_the_command_takes_what_the_lab_does(tmp_path: Path, settings: Build) -> None:
    path = experiment(tmp_path, settings)
    done = CliRunner().invoke(app, ["privacy", "audit", str(path), "--epsilons", "x"])
    assert done.exit_code == 2
    assert "must be numbers" in done.output


@pytest.mark.parametrize(
    ("strategy", "columns"),
    [("fedavg", {"A", "B", "other"}), ("ffa", {"B", "other"}), ("fedsa", {"A"}),
     ("fedsb", {"R", "other"}), ("flora", {"A", "B", "other"}), ("fedex", {"A", "B", "other"})],
)  # fmt: skip
def test_the_seat_sees_what_a_client_changed_in_the_columns_that_travel(
    tmp_path: Path, settings: Build, strategy: str, columns: set[str]
) -> None:
    config = Config.read(
        settings(
            "bert",
            **{
                "strategy.name": strategy,
                "clients.ranks": "3",
                "train.steps": 2,
                "clients.count": 3,
            },
        )
    )
    labels = cache.corpus(config).labels
    rows = [cache.encoded("train", i, config, labels) for i in range(3)]
    seat = Seat(config)
    seat.warm(rows)
    sent, _ = seat.send(1, rows[1], config)
    change = seat.change(1, sent)
    assert set(change) == columns
    for column in columns:
        assert all(bool(x.any()) for x in change[column].values()), column
    nothing = seat.change(1, _began(seat, sent))
    assert all(not bool(x.any()) for xs in nothing.values() for x in xs.values())


def _began(seat: Seat, sent):  # type: ignore[no-untyped-def]
    from fedlora.strategies.base import travelling

    with seat.received(1) as (came, factors):
        return travelling(seat.strategy.upload(factors, seat.kept.get(1))[0], came.trainable)


def test_rows_that_are_picked_and_joined_are_the_rows(settings: Build) -> None:
    config = Config.read(settings("bert"))
    rows = cache.encoded("train", 0, config, cache.corpus(config).labels)
    few = rows.select(torch.tensor([3, 0]))
    assert few.ids[: int(few.starts[1])].equal(rows.ids[int(rows.starts[3]) : int(rows.starts[4])])
    both = joined([few, rows])
    assert len(both) == len(rows) + 2
    assert both.lengths.tolist() == [*few.lengths.tolist(), *rows.lengths.tolist()]
    assert both.select(torch.arange(2, len(both))).ids.equal(rows.ids)
    assert json.dumps(both.starts.tolist())


def test_a_probe_that_ran_alone_has_its_scores_on_the_page(tmp_path: Path) -> None:
    lab = Lab.load("privacy", {}, tmp_path, only=("probe",))
    (tmp_path / "rows").mkdir()
    row = {"seed": 0, "epsilon": 8, "accuracy": 0.8125}
    (tmp_path / "rows" / "probe-0-8.json").write_text(json.dumps(row))
    write(lab, "fedlora privacy audit privacy --attack probe")
    assert "| linear probe |  | 81.2 |  |  |" in (tmp_path / "privacy.md").read_text()
