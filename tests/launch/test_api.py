"""`import fedlora`: every public name, its example, and what it is lazy about."""

import ast
import doctest
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlora
from fedlora import Config, FedLoraError, Observer, Run, check, export, load_config, open_run
from fedlora import simulate as run_here
from fedlora.errors import ConfigError
from fedlora.lora.adapter import Pair
from fedlora.strategies import STRATEGIES, registry
from fedlora.strategies.registry import Registry
from tests.support import own_code
from tests.support.tiny_federation import Ran, directory_of, python, quick

Settings = Callable[..., dict[str, object]]
NAMES = (
    "Config", "load_config", "check", "simulate", "open_run", "Run", "Federation",
    "make_client_app", "Strategy", "register_strategy", "register_task", "list_strategies",
    "Observer", "export",
    "FedLoraError",
)  # fmt: skip
IN_ORDER = ("simulate", *(n for n in NAMES if n != "simulate"))
"""The first makes the run that the others' examples look at."""


def test_the_public_names_are_these() -> None:
    assert set(fedlora.PUBLIC) == set(NAMES)
    assert set(fedlora.__all__) == {*NAMES, "__version__"}
    assert set(NAMES) <= set(dir(fedlora))
    with pytest.raises(AttributeError, match="module 'fedlora' has no attribute 'nothing'"):
        fedlora.nothing  # noqa: B018


def test_what_type_checkers_are_told_is_what_is_imported() -> None:
    tree = ast.parse(Path(fedlora.__file__).read_text())
    told = {
        a.name: node.module
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for a in node.names
    }
    assert told == fedlora.PUBLIC


def test_to_import_it_loads_no_torch() -> None:
    heavy = "torch", "transformers", "peft", "flwr", "pandas", "datasets", "pydantic"
    code = f"import sys, fedlora; print([m for m in {heavy} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


@pytest.mark.slow
def test_no_module_hides_a_public_name() -> None:
    """Importing every module of every room, old names too, leaves each what it is."""
    code = """
import importlib, pkgutil, warnings, fedlora
from fedlora.moved import MOVED
warnings.simplefilter("ignore")
for m in pkgutil.walk_packages(fedlora.__path__, "fedlora."):
    if not m.name.endswith("__main__"):
        importlib.import_module(m.name)
for name in MOVED:
    importlib.import_module(f"fedlora.{name}")
for name, module in fedlora.PUBLIC.items():
    assert getattr(fedlora, name) is getattr(importlib.import_module(module), name), name
    assert getattr(fedlora, name).__name__ == name, name
print("same")
"""
    ran = python(code)
    assert ran.stdout.strip() == "same", ran.stderr


def test_no_module_of_ours_imports_the_root() -> None:
    root = Path(fedlora.__file__).parent
    for m in pkgutil.walk_packages([str(root)], "fedlora."):
        path = root.joinpath(*m.name.split(".")[1:])
        path = path / "__init__.py" if m.ispkg else path.with_suffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "fedlora" not in {a.name for a in node.names}, m.name
            if isinstance(node, ast.ImportFrom) and node.module == "fedlora":
                rooms = {a.name for a in node.names}
                assert not rooms & {*NAMES, "__version__"}, m.name


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "REGISTRY", Registry({}, []))


@pytest.mark.slow
def test_every_public_name_has_an_example_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    """In one directory, as a user would type them."""
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    for name in IN_ORDER:
        x = getattr(fedlora, name)
        found = [t for t in finder.find(x, name, module=importlib.import_module(x.__module__))
                 if t.examples]  # fmt: skip
        assert found, f"{name} has no example"
        for test in found:
            test.globs = {}
            runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


# -- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tiny: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    from tests.conftest import tiny_settings

    out = tmp_path_factory.mktemp("api")
    given = tiny_settings(dict(tiny), out, "float32", "bert", **{"train.steps": 2})
    return run_here(given)


def test_a_run_reads_as_tables(ran: Run) -> None:
    lines = Ran(ran.directory).rounds
    rounds = ran.rounds
    assert list(rounds["round"]) == [r["round"] for r in lines]
    assert list(rounds["evaluation.accuracy"]) == [r["evaluation"]["accuracy"] for r in lines]
    assert list(rounds["bytes.up"]) == [r["bytes"]["up"] for r in lines]
    assert not [c for c in rounds.columns if c.startswith("clients.")]
    clients = ran.clients
    assert list(clients["rank"]) == [2, 3, 5, 2]
    assert clients["final.accuracy"].between(0, 1).all()
    assert ran.summary["final"]["accuracy"] == lines[-1]["evaluation"]["accuracy"]
    assert ran.config.clients.count == 4
    assert repr(ran).startswith(f"Run({str(ran.directory)!r}: fedex, 3 rounds, accuracy 0.")


def test_its_adapter_and_its_model_are_what_an_export_writes(ran: Run, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    export(ran, tmp_path / "out")
    adapter = ran.adapter()
    base = AutoModelForSequenceClassification.from_pretrained(ran.config.model.path, num_labels=3)
    peft = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    batch = ran.tokenizer()(["red cat one", "two"], padding=True, return_tensors="pt")
    with torch.no_grad():
        want, got = peft(**batch).logits, ran.model()(**batch).logits
    torch.testing.assert_close(got, want)
    assert got.argmax(1).max() < len(ran.labels) == 3
    pairs = [k for k in adapter if "lora_A" in k]
    assert len(pairs) == 6
    for a in pairs:
        pair = Pair(adapter[a], adapter[a.replace("lora_A", "lora_B")])
        assert pair.delta().norm() > 0


def test_a_run_that_was_cut_short_opens_too(ran: Run, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "cut"
    shutil.copytree(ran.directory, copy)
    for name in ("summary.json", "clients.jsonl"):
        (copy / name).unlink()
    shutil.rmtree(copy / "adapter")
    cut = open_run(copy)
    assert "not finished" in repr(cut)
    assert len(cut.rounds) == 4
    assert len(cut.clients) == 4
    assert cut.adapter().keys() == ran.adapter().keys()


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedLoraError, match=r"no rounds\.jsonl here.* name one that a run wrote to"):
        open_run(tmp_path)


def test_a_run_opens_from_within_its_own_directory(
    ran: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ran.directory / "checkpoint")
    section = open_run("..").config.run
    assert (section.out, section.name) == (str(ran.directory.parent), ran.directory.name)
    monkeypatch.chdir(ran.directory)
    assert open_run(".").config.flat() == ran.config.flat()


def test_a_round_without_a_table_has_no_column_of_its_name(settings: Settings) -> None:
    """Round 0 has neither proof nor certificate, round 1 no evaluation."""
    given = settings("bert", **quick("fedavg", **{"evaluate.every": 2}))
    rounds = run_here(given).rounds
    assert not {"evaluation", "proof", "certificate"} & {*rounds.columns}
    assert list(rounds["evaluation.accuracy"].isna()) == [False, True, False]
    assert list(rounds["proof.deviation"].isna()) == [True, False, False]


def test_a_notebook_shows_a_run_as_a_table_of_text(ran: Run, tmp_path: Path) -> None:
    import shutil

    shown = ran._repr_html_()
    assert "<th>strategy</th><td>fedex</td>" in shown
    assert "<td>3 rounds</td>" in shown
    assert f"accuracy {ran.summary['final']['accuracy']:.3f}" in shown
    shutil.copytree(ran.directory, copy := tmp_path / "<script>")
    assert "&lt;script&gt;" in open_run(copy)._repr_html_()
    assert "<script>" not in open_run(copy)._repr_html_()


# -- simulate, check, load_config ----------------------------------------------------------------


class Seen(Observer):
    def __init__(self, stop: int = 99) -> None:
        self.rounds: list[int] = []
        self.stop = stop

    def round_done(self, record: Mapping[str, Any]) -> None:
        self.rounds.append(record["round"])
        if record["round"] == self.stop:
            raise RuntimeError("enough")


def test_observers_are_told_of_each_round_and_one_that_raises_stops_a_run_that_goes_on(
    settings: Settings,
) -> None:
    given, one, two = settings("bert", **quick("fedavg")), Seen(), Seen(stop=1)
    with pytest.raises(RuntimeError, match="enough") as stopped:
        run_here(given, observers=[one, two])
    whose, how = stopped.value.__notes__
    assert whose == "the observer Seen raised this in round_done"
    assert how == f"continue with: fedlora simulate --resume {directory_of(given)}"
    assert one.rounds == two.rounds == [0, 1]
    more = Seen()
    run = run_here(given, {"run.resume": True}, observers=[more])
    assert more.rounds == [2]
    assert list(run.rounds["round"]) == [0, 1, 2]


def test_simulate_takes_ones_own_model_data_loss_and_metrics(settings: Settings) -> None:
    given = settings(**quick("fedex")) | {"lora.target-modules": "inner,outer"}
    given |= {"evaluate.every": 1, "simulate.workers": 2, "clients.ranks": "3"}
    run = run_here(
        given, model=own_code.make_model, tokenizer=own_code.make_tokenizer, data=own_code.rows,
        loss=own_code.smoothed, metrics=own_code.top_two, strategy=STRATEGIES["fedavg"],
    )  # fmt: skip
    assert run.summary["strategy"] == "fedavg"
    assert run.rounds["evaluation.top_two"].between(0, 1).all()
    batch = run.tokenizer()(["red cat one"], return_tensors="pt")
    assert run.model()(**batch).shape == (1, 3)


def test_what_cannot_run_is_refused_before_anything_is_loaded(settings: Settings) -> None:
    given = settings(**quick("fedsa")) | {"model.path": "nowhere"}
    with pytest.raises(ConfigError, match="keeps a factor on its clients"):
        run_here(given, {"robust.method": "median"})


def test_check_says_what_simulate_refuses_and_nothing_where_it_runs(settings: Settings) -> None:
    given = settings(**quick("fedavg"))
    assert check(given) == []
    assert check(Config.read(given)) == []
    (problem,) = check(given, {"data.path": "nowhere.jsonl"})
    assert "nowhere.jsonl" in problem
    assert any("did you mean" in x for x in check(given, {"train.rl": 1}))
    assert "must be 3 at least" in check(given, {"secure.aggregation": True, "clients.count": 2})[0]
    assert "no such file" in check("nothing.toml")[0]


def test_a_config_is_loaded_by_path_by_name_or_from_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[run]\nname = "mine"\nrounds = 3\n[model]\npath = "m"\n[data]\npath = "d"\n')
    paths = {"model": {"path": "m"}, "data": {"path": "d"}}
    given = load_config({"run": {"rounds": 3}, **paths})
    assert load_config(path).run.rounds == given.run.rounds == 3
    nested = load_config({"run": {"rounds": 3, "name": "x"}, **paths}, {"run.rounds": 4})
    assert (nested.run.rounds, nested.run.name) == (4, "x")
    assert load_config("quickstart").clients.count == 8
