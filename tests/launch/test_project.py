"""`fedlora init` writes what runs at once; `fedlora schema` says what a file may hold."""

import importlib.util
import json
import os
import runpy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from fedlora import simulate
from fedlora.cli import app, main
from fedlora.config.json_schema import schema
from fedlora.config.reader import Config
from fedlora.config.task_names import KINDS
from fedlora.errors import ConfigError
from fedlora.launch.experiment_file import load, shipped
from fedlora.launch.project import STARTERS, written
from fedlora.training import cache
from fedlora.version import __version__
from tests.support.architectures import write
from tests.support.tiny_federation import python

Settings = Callable[..., dict[str, object]]


@pytest.mark.parametrize("form", STARTERS)
def test_a_project_can_run_and_its_rows_are_what_the_task_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    task = STARTERS[form].task or form
    for package in KINDS[task].needs:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    said = written(form, Path("mine"))
    rows = STARTERS[form].file
    order = f"README.md, {rows}" if rows == "pictures" else f"{rows}, README.md"
    assert said[0] == f"mine: experiment.toml, {order}"
    monkeypatch.chdir(tmp_path / "mine")
    assert f"`{rows}` holds generated rows" in Path("README.md").read_text()
    assert sum(x.stat().st_size for x in Path().rglob("*") if x.is_file()) < 400_000
    config = load("experiment.toml")
    assert config.model.task == task
    corpus = cache.corpus(config)
    assert len(corpus.test) in (32, 100)
    assert not list(corpus.account.warnings())
    jsonschema.validate(tomllib.loads(Path("experiment.toml").read_text()), schema())


def test_python_m_fedlora_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fedlora", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fedlora", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out) == (0, f"fedlora {__version__}\n")


@pytest.mark.parametrize(("given", "then"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None, then: str
) -> None:
    """It stands before torch is loaded, which reads it then: see the next test."""
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr("sys.argv", ["fedlora", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["OMP_WAIT_POLICY"] == then


def test_a_command_loads_no_torch_before_it_is_asked_for_something() -> None:
    code = "import sys, fedlora.cli; print([m for m in ('torch', 'flwr') if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_there_is_a_project_for_each_task_and_for_pairs_and_chats() -> None:
    assert {form.task or name for name, form in STARTERS.items()} == {*KINDS}
    assert {name for name, form in STARTERS.items() if form.task} == {"pairs", "chat"}


def test_a_package_that_the_scores_need_is_named_where_it_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "  pip install 'fedlora[metrics]'" in written("token-classification", tmp_path / "x")
    assert not any("pip install" in line for line in written("chat", tmp_path / "y"))
    assert "all-MiniLM-L6-v2" in (tmp_path / "x" / "experiment.toml").read_text()


@pytest.mark.parametrize(("task", "kind", "target"), [
    ("regression", "bert", "query"), ("image-classification", "vit", "q_proj"),
])  # fmt: skip
def test_a_project_learns_with_a_tiny_model(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, kind: str,
    target: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    written(task, Path())
    more: dict[str, Any] = {"model.path": settings(kind)["model.path"], "run.rounds": 1,
                            "lora.target-modules": target, "simulate.workers": 1}  # fmt: skip
    run = simulate("experiment.toml", more)
    assert len(run.rounds) >= 1


def test_a_project_of_an_encoder_decoder_learns_with_a_tiny_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written("seq2seq", Path())
    model = write("t5", tmp_path / "t5", "T5ForConditionalGeneration")
    run = simulate("experiment.toml", {"model.path": str(model), "run.rounds": 1,
                                       "simulate.workers": 1, "train.steps": 2})  # fmt: skip
    assert run.rounds["proof.deviation"].dropna().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(  # no package has a base of the others
    "task", [x for x in STARTERS if x not in ("seq2seq", "image-classification")]
)
def test_a_project_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written(task, Path())
    run = simulate("experiment.toml")
    first = run.rounds[run.rounds["round"] == 0].iloc[0]
    assert run.summary["final"]["loss"] < first["evaluation.loss"]


def test_nothing_that_is_there_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="is there already, and is left as it is"):
        written("classification", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    with pytest.raises(ConfigError, match="init clasification: must be one of classification, "):
        written("clasification", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=r"rows\.jsonl is a file; name a directory"):
        written("classification", tmp_path / "rows.jsonl")


def test_what_is_wrong_with_a_command_is_not_said_of_a_config(tmp_path: Path) -> None:
    for words in ["init nosuch", "config nosuch.toml", "config quickstart --set a",
                  f"simulate --resume {tmp_path}"]:  # fmt: skip
        found = CliRunner().invoke(app, words.split())
        assert str(found.exception).startswith("1 problem in the command:\n  ")
        assert "Fix the file" not in str(found.exception)


# -- the schema -----------------------------------------------------------------------------------


def problems(text: str) -> list[str]:
    checks = jsonschema.Draft202012Validator(schema())
    return [f"{e.json_path}: {e.message}" for e in checks.iter_errors(tomllib.loads(text))]


def test_every_experiment_that_ships_and_every_default_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    for path in shipped().values():
        assert problems(path.read_text()) == [], path.name
    assert problems(Config().toml()) == []


@pytest.mark.parametrize(("text", "where"), [
    ("[train]\nlearning-rate = 1", "learning-rate"),
    ("[trian]\nlr = 1.0", "trian"),
    ("[train]\nlr = 'fast'", "$.train.lr"),
    ("[train]\nlr = -1", "$.train.lr"),
    ("[run]\nrounds = 0", "$.run.rounds"),
    ("[model]\ndtype = 'float64'", "$.model.dtype"),
    ("[model]\ntask = 'translation'", "$.model.task"),
    ("[strategy]\nname = 'fedx'", "$.strategy.name"),
    ("[strategy.ravan]\nhead-rank = 'four'", "head-rank"),
])  # fmt: skip
def test_what_the_reader_refuses_the_schema_refuses(text: str, where: str) -> None:
    assert any(where in problem for problem in problems(text))
    with pytest.raises(ConfigError):
        Config.read(tomllib.loads(text))


def test_every_key_has_its_words() -> None:
    tables = schema()["properties"]
    flat = {key for key in Config().flat() if not key.startswith("strategy.")}
    bare = [k for k in flat if k.partition(".")[2] not in tables[k.partition(".")[0]]["properties"]]
    assert not bare
    said = [p for t in tables.values() for p in t.get("properties", {}).values()]
    assert sum("description" in p for p in said) > 100


def test_the_command_prints_it_and_init_writes(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["schema"])
    assert json.loads(found.output) == schema()
    found = CliRunner().invoke(app, ["init", "regression", str(tmp_path / "x")])
    assert found.exit_code == 0, found.output
    assert "fedlora simulate experiment.toml" in found.output
