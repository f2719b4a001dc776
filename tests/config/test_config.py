"""The run config: one reader, every problem at once, and defaults written once."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fedlora.config.defaults import resolve_defaults
from fedlora.config.reader import Config, parse_overrides, strategy_defaults
from fedlora.errors import ConfigError
from fedlora.launch.experiment_file import load
from fedlora.strategies import STRATEGIES
from tests.support.doc_tables import load as module
from tests.support.tiny_federation import ROOT

FLAT = Config().flat()
written = module(ROOT / "docs" / "write_defaults.py", "docs_write_defaults")


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def resolved(config: Config) -> Config:
    names = ("train", "model", "lora")
    own = strategy_defaults(config.strategy.name)
    found = resolve_defaults(*(getattr(config, n) for n in names), config.privacy, own)
    train, _, lora = found
    gave = [f"train.lr={train.lr}", f"lora.alpha={lora.alpha}", f"lora.init={lora.init}"]
    gave += ["by-modules"] if own.few else []
    run = config.run.model_copy(update={"defaults": (config.strategy.name, *gave)})
    return config.model_copy(update={"run": run, **dict(zip(names, found, strict=True))})


def problems(given: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config.read(given)
    return caught.value.problems


def test_pyproject_lists_every_key_with_its_default(tmp_path: Path) -> None:
    """And what `flwr run .` trains. After a change: python docs/write_defaults.py."""
    text = (ROOT / "pyproject.toml").read_text()
    table = leaves(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    quickstart = Config.load(ROOT / "simulations" / "experiments" / "quickstart.toml").flat()
    trained = {key: quickstart[key] for key in ("model.path", "data.path")}
    assert table == {**FLAT, **trained}
    assert [type(v) for v in table.values()] == [type(FLAT[k]) for k in table]
    (tmp_path / "pyproject.toml").write_text(text)
    written.write_defaults(tmp_path / "pyproject.toml")
    assert (tmp_path / "pyproject.toml").read_text() == text


def test_flower_takes_every_value_as_it_is() -> None:
    assert all(isinstance(v, bool | int | float | str) for v in FLAT.values())


def test_flat_and_read_are_inverse() -> None:
    assert Config.read(FLAT) == Config.read({}) == resolved(Config())


def test_toml_and_read_are_inverse(tmp_path: Path) -> None:
    config = Config.read(
        {
            "data.line-pattern": r'(?P<label>\w+),"(?P<text>.+)"',
            "clients.ranks": "3,1,2",
            "lora.target-modules": "a,b.c",
            "strategy.name": "lora-a2",
            "train.lr": 1e-7,
            "data.map": "HUM=per son,LOC=place",
        }
    )
    (tmp_path / "x.toml").write_text(config.toml())
    assert Config.load(tmp_path / "x.toml") == config
    assert Config.read(config.flat()) == config


def test_tables_lists_and_dotted_keys_say_the_same() -> None:
    nested = {"clients": {"ranks": [4, 8]}, "lora": {"target-modules": ["q", "v"]}}
    assert Config.read(nested) == Config.read(
        {"clients.ranks": "4, 8", "lora.target-modules": "q, v"}
    )


def test_all_problems_are_said_at_once_each_with_its_key() -> None:
    found = problems(
        {
            "lora.alhpa": 3.0,
            "train": {"lr": -1.0, "batch-size": "8"},
            "strategy.name": "fedexx",
            "clients.ranks": "4,0",
            "nonsense.key": 1,
            "data.partition": "random",
        }
    )
    text = "\n".join(found)
    assert len(found) == 7
    assert 'lora.alhpa: no such key; did you mean "lora.alpha"?' in found
    assert "nonsense.key: no such key" in found
    assert "train.lr = -1.0: must be greater than or equal to 0" in text
    assert "train.batch-size = '8': must be a whole number" in text
    assert "strategy.name = 'fedexx'" in text
    assert "'lora-a2'" in text  # what it may be
    assert "clients.ranks = '4,0'" in text
    assert "data.partition = 'random'" in text


@pytest.mark.parametrize(
    ("key", "near"),
    [("privacy.clipnorm", "privacy.clip-norm"), ("lora.target_modules", "lora.target-modules"),
     ("train.rounds", "run.rounds"), ("strategy.fedex.ranks", "strategy.fedex.rank")],
)  # fmt: skip
def test_an_unknown_key_gets_the_nearest_one(key: str, near: str) -> None:
    (problem,) = problems({key: 1})
    assert problem == f'{key}: no such key; did you mean "{near}"?'


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora.alpha", "16"), ("lora.alpha", True), ("train.steps", 2.5), ("train.steps", True),
     ("run.resume", 1), ("run.resume", "true"), ("model.path", 3), ("train.lr", math.nan),
     ("train.lr", math.inf), ("lora.dropout", 1.0), ("run.rounds", 0), ("clients.ranks", ""),
     ("clients.ranks", "a"), ("clients.ranks", True), ("clients.ranks", [4.5]),
     ("wire.dtype", "float16"), ("data.client-test-fraction", 1.0), ("data.map", "x"),
     ("run", 3), ("lora.target-modules", 7)],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_with_its_key(key: str, value: Any) -> None:
    (problem,) = problems({key: value})
    assert problem.startswith(key)


def test_a_whole_number_is_a_fine_float() -> None:
    assert Config.read({"lora.alpha": 16}).lora.alpha == 16.0


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_option_of_every_strategy_can_be_set(name: str) -> None:
    assert Config.read({"strategy.name": name}).build_strategy() == STRATEGIES[name]()
    for key, default in FLAT.items():
        if key.startswith(f"strategy.{name}."):
            value = next(
                v
                for v in (not default, 2, 0.25, *("keep-A", "svd-w0", "hits", "b"), default)
                if type(v) is type(default) and accepted(name, key, v)
            )
            built = Config.read({"strategy.name": name, key: value}).build_strategy()
            option = key.rsplit(".", 1)[1].replace("-", "_")
            assert getattr(built, option) == value
            assert f"strategy.{name}.{option.replace('_', '-')}" in FLAT


def accepted(name: str, key: str, value: Any) -> bool:
    try:
        Config.read({"strategy.name": name, key: value})
    except ConfigError:
        return False
    return True


def test_an_option_of_the_wrong_type_names_its_key() -> None:
    (problem,) = problems({"strategy.fedex.rank": "all"})
    assert problem.startswith("strategy.fedex.rank = 'all': must be a whole number")


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [("train.lr=1e-3", "train.lr", 1e-3), ("run.name=x", "run.name", "x"),
     ("run.name='7'", "run.name", "7"), ("clients.ranks=4,8", "clients.ranks", "4,8"),
     ("clients.ranks=[4, 8]", "clients.ranks", [4, 8]), (" run.seed = 3 ", "run.seed", 3),
     ("run.resume=true", "run.resume", True), ("data.prompt=a=b", "data.prompt", "a=b"),
     ("model.path=", "model.path", "")],
)  # fmt: skip
def test_an_override_is_read_as_toml_or_else_as_text(given: str, key: str, value: Any) -> None:
    assert parse_overrides([given]) == {key: value}


def test_an_override_without_equals_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set train\.lr: must be key=value"):
        parse_overrides(["train.lr"])


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[train]\nlr = 0.5\nsteps = 3\n")
    config = Config.load(tmp_path / "x.toml", {"train.lr": 0.25})
    assert (config.train.lr, config.train.steps) == (0.25, 3)


def test_a_file_that_is_not_there_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        Config.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not TOML"):
        Config.load(tmp_path / "bad.toml")


def test_the_file_of_an_app_is_read_as_its_experiment() -> None:
    there = ROOT / "pyproject.toml"
    config = tomllib.loads(there.read_text())["tool"]["flwr"]["app"]["config"]
    assert Config.load(there, {"run.rounds": 3}) == Config.read({**leaves(config), "run.rounds": 3})


@pytest.mark.parametrize("path", sorted((ROOT / "simulations" / "experiments").glob("*.toml")))
def test_every_experiment_that_ships_can_be_read(path: Path) -> None:
    assert load(path).run.rounds > 0


junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)


@given(
    given=st.dictionaries(
        st.sampled_from(sorted(FLAT)) | st.text(max_size=12), junk | st.lists(junk, max_size=3),
        max_size=5,
    )
)  # fmt: skip
@example(given={"run.defaults": None})
@examples(max_examples=300, deadline=None)
def test_nothing_raises_anything_but_a_config_error(given: dict[str, Any]) -> None:
    try:
        config = Config.read(given)
    except ConfigError:
        return
    assert Config.read(config.flat()) == config


# -- defaults that depend on other keys ---------------------------------------------------------


def test_what_is_not_set_is_what_the_lab_found_best_under_dp() -> None:
    private = Config.read({"privacy.epsilon": 3.0, "privacy.clip-norm": 0.5})
    assert (private.train.optimizer, private.train.momentum, private.train.lr) == ("sgd", 0.8, 6.0)
    assert (private.model.pooling, private.lora.layers) == ("mean", ("-1",))
    assert Config.read({"privacy.epsilon": 1.0}).train.lr == pytest.approx(1 / 0.3)
    open_ = Config.read({})
    assert (open_.train.optimizer, open_.train.momentum) == ("adamw", 0.0)
    assert open_.train.lr == strategy_defaults(open_.strategy.name).rates["classification"]
    assert (open_.model.pooling, open_.lora.layers) == ("default", ())
    by_client = Config.read({"privacy.epsilon": 3.0, "privacy.level": "client"})
    assert by_client.train.optimizer == "adamw", "its noise is at the server, not in the steps"


def test_what_is_set_stays_under_dp_and_settling_twice_changes_nothing() -> None:
    given = {"privacy.epsilon": 3.0, "train.optimizer": "adamw", "model.pooling": "default"}
    config = Config.read({**given, "lora.layers": "", "train.momentum": 0.0})
    assert (config.train.optimizer, config.train.lr) == ("adamw", 1e-2)
    assert (config.model.pooling, config.lora.layers) == ("default", ())
    assert Config.read(config.flat()) == config


def test_one_number_is_a_list_of_one_where_a_list_is_wanted() -> None:
    """As `--set lora.layers=-1` reads it."""
    assert Config.read(parse_overrides(["lora.layers=-1"])).lora.layers == ("-1",)
    assert Config.read({"lora.layers": [-2, -1]}).lora.layers == ("-2", "-1")
