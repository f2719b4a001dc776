"""An experiment is found by its path or its name, in each command that takes one."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.launch import experiment_file
from fedlora.launch.deploy.layout import Wanted, init
from fedlora.launch.experiment_file import find, load, shipped
from fedlora.launch.simulate.run import resumed
from fedlora.version import __version__
from tests.support.tiny_federation import ROOT

TOMLS = sorted((ROOT / "simulations" / "experiments").glob("*.toml"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_experiment_that_ships_has_a_name(elsewhere: Path) -> None:
    assert list(shipped().values()) == TOMLS
    for path in TOMLS:
        assert find(path.stem) == path
        assert load(path.stem) == load(path)


def test_a_path_that_exists_wins_over_a_name(elsewhere: Path) -> None:
    text = 'run.rounds = 77\nmodel.path = "here"\ndata.path = "there"\n'
    Path("quickstart").write_text(text)
    assert load("quickstart").run.rounds == 77
    assert load(Path("quickstart")).run.rounds == 77


def test_a_directory_of_that_name_hides_none(elsewhere: Path) -> None:
    Path("quickstart").mkdir()
    assert find("quickstart").is_file()
    Path("mine").mkdir()
    with pytest.raises(ConfigError, match="mine: no such file"):
        find("mine")


@pytest.mark.parametrize("name", ["quikstart", "simulations/quickstart.toml", "quick-start.toml"])
def test_an_unknown_name_gives_one_error_with_the_names_and_the_nearest(
    name: str, elsewhere: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        find(name)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{name}: no such file")
    assert ", ".join(path.stem for path in TOMLS) in problem
    assert problem.endswith('; did you mean "quickstart"?')


def test_a_name_that_is_like_none_gets_no_nearest(elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match=r"quickstart, synthetic$"):
        find("zzz", also=["synthetic"])


def test_where_none_ship_a_path_is_all_there_is(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an app bundle, which carries code alone."""
    monkeypatch.setattr(experiment_file, "PLACES", (elsewhere / "none",))
    assert shipped() == {}
    with pytest.raises(ConfigError, match="quickstart: no such file"):
        find("quickstart")


COMMANDS = (
    ["simulate", "{}"], ["simulate", "{}", "--engine", "flower"], ["config", "{}"],
    ["compare", "{}"], ["doctor", "{}"], ["privacy", "audit", "{}"],
    ["deploy", "init", "d", "--clients", "2", "--experiment", "{}"],
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_names_what_ships(command: list[str], elsewhere: Path) -> None:
    done = CliRunner().invoke(app, [part.format("quikstart") for part in command])
    said = re.sub(r"\s+", " ", done.output + str(done.exception))
    assert done.exit_code == 1
    assert 'did you mean "quickstart"?' in said


def test_config_prints_the_experiment_of_that_name(elsewhere: Path) -> None:
    done = CliRunner().invoke(app, ["config", "quickstart", "--set", "run.rounds=3"])
    assert done.output == load("quickstart", {"run.rounds": 3}).toml()


def test_a_deployment_is_made_of_the_experiment_of_that_name(elsewhere: Path) -> None:
    plan = init(Wanted(elsewhere / "d", 2, Path("quickstart"), own_data=False))
    project = tomllib.loads((plan.app / "pyproject.toml").read_text())
    found = Config.read(project["tool"]["flwr"]["app"]["config"])
    assert found == load("quickstart", {"clients.count": 2, "run.out": "runs"})


def test_a_run_that_never_began_cannot_go_on(elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.toml: name the directory of a run"):
        resumed(elsewhere / "runs" / "none")


def test_the_version_is_said_without_a_command() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"fedlora {__version__}\n")


def test_the_list_of_what_ships_has_a_line_for_each() -> None:
    rows: Callable[[str], list[str]] = re.compile(r"^\| `([\w-]+)` \|", re.M).findall
    assert rows((ROOT / "simulations" / "README.md").read_text()) == [p.stem for p in TOMLS]
