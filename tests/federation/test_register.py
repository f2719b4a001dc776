"""Strategies from elsewhere: registered by a call, or by an installed package's entry point."""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from typer.main import get_command

from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, StrategyError
from fedlora.federation.server.journal import state_types
from fedlora.launch.export import export_run
from fedlora.strategies import STRATEGIES, list_strategies, register_strategy, registry
from fedlora.strategies.base import Needs
from fedlora.strategies.registry import Registry
from tests.support.long import few
from tests.support.own_state import Padded
from tests.support.own_strategy import Mine
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing registered before the test, and nothing after it."""
    monkeypatch.setattr(registry, "REGISTRY", Registry({}, []))


@pytest.fixture
def mine() -> None:
    register_strategy("mine", Mine, states=(Padded,))


# -- a call -------------------------------------------------------------------------------------


def test_a_registered_strategy_is_read_by_its_name_with_its_options(mine: None) -> None:
    config = Config.read({"strategy.name": "mine", "strategy.mine.far": 0.5})
    assert config.build_strategy() == Mine(far=0.5)
    nested = {"strategy": {"name": "mine", "mine": {"absent": "skipped"}}}
    assert Config.read(nested).build_strategy() == Mine(absent="skipped")


def test_its_options_go_through_flat_and_toml_and_back(mine: None) -> None:
    config = Config.read({"strategy.name": "mine", "strategy.mine.far": 0.5})
    assert config.flat()["strategy.mine.far"] == 0.5
    assert Config.read(config.flat()) == config
    assert Config.read(tomllib.loads(config.toml())) == config


def test_its_options_are_checked_as_any_key_is(mine: None) -> None:
    given = {"strategy.mine.far": "x", "strategy.mine.absent": "no", "strategy.mine.fr": 1}
    with pytest.raises(ConfigError) as e:
        Config.read(given)
    assert len(e.value.problems) == 3
    assert 'strategy.mine.fr: no such key; did you mean "strategy.mine.far"?' in e.value.problems


def test_it_may_be_registered_after_a_config_was_read() -> None:
    before = Config.read({})
    with pytest.raises(ConfigError, match="did you mean 'flora'"):
        Config.read({"strategy.name": "flra"})
    with pytest.raises(ConfigError, match=r"strategy.mine.far: no such key"):
        Config.read({"strategy.mine.far": 0.5})
    register_strategy("mine", Mine)
    assert Config.read({"strategy.name": "mine"}).build_strategy() == Mine()
    assert Config.read({}).flat() == before.flat()
    register_strategy("other-one", Mine)
    given = {"strategy.name": "other-one", "strategy.other-one.far": 0.25}
    assert Config.read(given).build_strategy() == Mine(far=0.25)


def test_a_run_of_another_strategy_does_not_depend_on_it(mine: None) -> None:
    """Its config is one that a node without the package can read, but for options it was given."""
    assert Config.read({"strategy.name": "fedex"}).flat().keys() == Config().flat().keys()
    assert not [k for k in Config().flat() if "mine" in k]
    given = Config.read({"strategy.name": "fedex", "strategy.mine.far": 0.5})
    assert Config.read(given.flat()) == given


def test_an_unknown_name_gets_all_there_are_and_the_nearest(mine: None) -> None:
    with pytest.raises(ConfigError) as e:
        Config.read({"strategy.name": "mina"})
    (problem,) = e.value.problems
    assert problem.startswith("strategy.name = 'mina': must be 'fedavg', 'ffa', ")
    assert problem.endswith(" or 'mine'; did you mean 'mine'?")


def test_the_list_is_read_only_and_begins_with_fedloras_own(mine: None) -> None:
    assert list(list_strategies()) == [*STRATEGIES, "mine"]
    with pytest.raises(TypeError):
        list_strategies()["x"] = Mine  # type: ignore[index]


def test_the_command_lists_it(mine: None) -> None:
    done = CliRunner().invoke(get_command(app), ["strategies"])
    assert "mine" in done.output
    assert "A user's own strategy" in " ".join(done.output.split())


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Mine", "my_own", "-x", "a--b", "", "name", "copy", "model-x"])
def test_a_name_that_is_no_key_is_refused(name: str) -> None:
    with pytest.raises(StrategyError, match="small letters, digits and single hyphens"):
        register_strategy(name, Mine)


def test_a_name_is_given_once(mine: None) -> None:
    register_strategy("mine", Mine, states=(Padded,))  # the same once more
    for name, by in (("fedavg", "fedavg.FedAvg"), ("mine", "tests.support.own_strategy.Mine")):
        with pytest.raises(StrategyError, match=rf"taken by .*{by}; choose another"):
            register_strategy(name, STRATEGIES["ffa"])


def test_each_missing_method_is_said() -> None:
    @dataclass(frozen=True)
    class Half:
        def needs(self) -> Needs:
            return Needs()

        def aggregate(self, state: Any) -> Any: ...

    with pytest.raises(StrategyError) as e:
        register_strategy("half", Half)  # type: ignore[arg-type]
    said = str(e.value)
    for method in ("init(start)", "download(state, client, round)", "upload(trained, kept)",
                   "promise: write it as a property", "effective(state, client)"):  # fmt: skip
        assert f"Half has no {method}" in said
    assert "Half.aggregate must be callable as aggregate(state, uploads, round)" in said
    assert "Half has no needs" not in said


def without(cls: type, *names: str, **instead: object) -> type:
    """The class as it would be without these attributes, or with others."""
    kept = {k: v for k, v in vars(cls).items() if k not in (*names, "__dict__", "__weakref__")}
    return type("Old", (), {**kept, **instead})


def test_requires_of_old_is_told_to_write_needs() -> None:
    with pytest.raises(StrategyError, match=r"Old.requires is not read: write `def needs\(self\)"):
        register_strategy("old", without(Mine, "needs", requires=Needs()))


def test_a_class_put_into_the_dict_itself_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "old", without(Mine, "needs", requires=Needs()))
    with pytest.raises(ConfigError, match=r"strategy.name = 'old': .*\n.*write `def needs"):
        Config.read({"strategy.name": "old"}).build_strategy()


def test_a_need_without_its_method_is_a_problem_of_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls = without(Mine, needs=lambda self: Needs(first_gradient="clients" if self.far == 2 else ""))
    monkeypatch.setitem(STRATEGIES, "old", cls)
    Config.read({"strategy.name": "old"}).build_strategy()
    with pytest.raises(ConfigError, match="says first_gradient, and Old has no from_gradient"):
        Config.read({"strategy.name": "old", "strategy.old.far": 2.0}).build_strategy()


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        ({"needs": lambda self: None}, "must return Needs"),
        ({"promise": property(lambda self: "perfect")}, "must be one of exact, approximate"),
    ],
)
def test_what_it_answers_is_checked(instead: Mapping[str, object], words: str) -> None:
    with pytest.raises(StrategyError, match=words):
        register_strategy("old", without(Mine, **instead))


def test_options_must_be_what_a_config_can_hold() -> None:
    @dataclass
    class Thawed:
        x: int = 0

    @dataclass(frozen=True)
    class Listed(Mine):
        ranks: tuple[int, ...] = (1, 2)

    with pytest.raises(StrategyError, match="must be a frozen dataclass"):
        register_strategy("thawed", Thawed)  # type: ignore[arg-type]
    with pytest.raises(StrategyError, match=r"Listed.ranks must have a default that is a number"):
        register_strategy("listed", Listed)
    with pytest.raises(StrategyError, match="must be a class"):
        register_strategy("made", Mine())  # type: ignore[arg-type]
    with pytest.raises(StrategyError, match="must be a dataclass"):
        register_strategy("mine", Mine, states=(int,))


# -- entry points -------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Put a package on the path as an installer would: name, entry points, source."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, points: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        meta = tmp_path / f"{name}-1.0.dist-info"
        meta.mkdir()
        (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (meta / "entry_points.txt").write_text(f"[fedlora.strategies]\n{points}\n")

    return install


Install = Callable[[str, str, str], None]


def test_an_installed_package_adds_its_strategy(installed: Install) -> None:
    installed("theirs_a", "theirs = theirs_a:Mine", "from tests.support.own_strategy import Mine\n")
    assert Config.read({"strategy.name": "theirs", "strategy.theirs.far": 0.5}).build_strategy()


def test_an_entry_point_may_register_itself(installed: Install) -> None:
    source = """
from tests.support.own_state import Padded
from tests.support.own_strategy import Mine

def add():
    from fedlora.strategies import register_strategy
    register_strategy("theirs", Mine, states=(Padded,))
"""
    installed("theirs_b", "whatever = theirs_b:add", source)
    assert Padded in state_types(Config.read({"strategy.name": "theirs"}).build_strategy())
    assert registry.broken_packages() == ()


def test_a_package_that_cannot_be_loaded_is_named_and_the_others_work(installed: Install) -> None:
    installed("broken_c", "bad = broken_c:Mine", "raise RuntimeError('no such GPU')\n")
    installed("broken_d", "worse = broken_d:Half", "class Half: pass\n")
    installed("theirs_e", "theirs = theirs_e:Mine", "from tests.support.own_strategy import Mine\n")
    assert "theirs" in list_strategies()
    assert Config.read({}).build_strategy()
    with pytest.raises(ConfigError) as e:
        Config.read({"strategy.name": "bad"})
    assert "package broken_c offers a strategy 'bad' (broken_c:Mine)" in str(e.value)
    assert "RuntimeError: no such GPU" in str(e.value)
    one, two = registry.broken_packages()
    assert "broken_d" in one + two
    assert "Half has no aggregate(state, uploads, round)" in one + two
    assert "broken_c" in CliRunner().invoke(get_command(app), ["strategies"]).output


# -- a whole run --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", few([1, 2], 2))
def test_it_runs_resumes_and_exports_by_its_name(
    settings: Settings, tmp_path: Path, mine: None, workers: int
) -> None:
    own = {"strategy.mine.far": 0.5, "train.lr-schedule": "constant", "simulate.workers": workers}
    given = settings("bert", **quick("mine", **own, **{"run.rounds": 4, "run.name": "whole"}))
    whole = federate(given)
    half = {**given, "run.name": "half"}
    assert len(federate({**half, "run.rounds": 2}).rounds) == 3
    resumed = federate({**half, "run.resume": True})
    assert resumed.adapter == whole.adapter
    assert resumed.metrics == whole.metrics
    assert federate({**given, "run.name": "all", "strategy.mine.far": 1.0}).adapter != whole.adapter
    for form in ("peft", "merged"):
        done = export_run(resumed.directory, tmp_path / form, merged=form == "merged")
        assert done.deviation < 1e-4


def test_a_state_that_was_not_registered_is_refused_before_round_1(settings: Settings) -> None:
    """Why `states` is asked for: the module of Mine does not name Padded."""
    register_strategy("mine", Mine)
    with pytest.raises(StrategyError, match=r"holds a Padded.* states=\(Padded,\)"):
        federate(settings("bert", **quick("mine")))


def test_a_state_named_as_one_of_fedloras_own_is_refused() -> None:
    @dataclass(frozen=True)
    class Member:
        x: int = 0

    with pytest.raises(StrategyError, match="Member is a name of fedlora's own"):
        register_strategy("mine", Mine, states=(Member,))
