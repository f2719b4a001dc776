"""The run config: every knob of a run, typed, checked, in one place.

Flower hands both apps the same flat mapping of dotted keys ("lora.target-modules") to bool, int,
float or str; an experiment file is the same tree as TOML tables. `Config.read` is the only reader
of either. Defaults are written here once; pyproject.toml repeats them because Flower only lets
keys be overridden that it lists, and a test keeps the two equal.
"""

import difflib
import functools
import hashlib
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli_w
from pydantic import BaseModel, Field, ValidationError

from fedlora.config.defaults import rate_of, resolve_defaults
from fedlora.config.fields import Section, flat_list, said
from fedlora.config.origins import BY_MODULES, RECORD, decided, recorded, without_others
from fedlora.config.possible import impossible
from fedlora.config.privacy_sections import PrivacyConfig, SecureConfig
from fedlora.config.sections import (
    ClientsConfig,
    DataConfig,
    DevicesConfig,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    OutputConfig,
    PersonalizeConfig,
    ProofConfig,
    RankPolicyConfig,
    RobustConfig,
    RoundConfig,
    RunConfig,
    ServerConfig,
    SimulateConfig,
    StopConfig,
    TrainConfig,
    WireConfig,
)
from fedlora.config.sites import flat_sites
from fedlora.config.strategies import strategy_options, strategy_section, strategy_tables
from fedlora.config.toml_file import read_toml
from fedlora.errors import CommandError, ConfigError, StrategyError
from fedlora.strategies import Strategy, forms, list_strategies, registry
from fedlora.strategies.defaults import RULES, Defaults, defaults_of

Scalar = bool | int | float | str

NOT_THE_EXPERIMENT = (
    "run.resume", "run.out", "run.name", RECORD, "output.", "simulate.", "round.wait"
)  # fmt: skip
"""Keys that may change between a run and its continuation."""


class Config(Section):
    """Every key of a run. Frozen: `read` makes another, of `flat` with changes.

    >>> from fedlora import Config
    >>> config = Config.read({"strategy.name": "fedsa", "lora": {"alpha": 32.0}})
    >>> config.lora.alpha, config.train.batch_size
    (32.0, 16)
    >>> Config.read({**config.flat(), "train.batch-size": 8}).train.batch_size
    8
    """

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    lora: LoraConfig = LoraConfig()
    strategy: Any = Field(default_factory=lambda: strategy_section()())
    train: TrainConfig = TrainConfig()
    round: RoundConfig = RoundConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    stop: StopConfig = StopConfig()
    wire: WireConfig = WireConfig()
    proof: ProofConfig = ProofConfig()
    output: OutputConfig = OutputConfig()
    simulate: SimulateConfig = SimulateConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    ranks: RankPolicyConfig = RankPolicyConfig()
    devices: DevicesConfig = DevicesConfig()
    server: ServerConfig = ServerConfig()
    robust: RobustConfig = RobustConfig()
    personalize: PersonalizeConfig = PersonalizeConfig()
    secure: SecureConfig = SecureConfig()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Config":
        """The config of a flat or nested mapping of keys, parsed one key at a time.

        Whether they can be together is not asked here: `fedlora.preflight.read` does.

        Raises:
            ConfigError: keys are unknown, values have the wrong type or are out of range. All the
                problems are in one message, each unknown key with the nearest known one.
        """
        flat = dict(_flatten(given))
        known = _defaults(strategy_section())
        problems = [_unknown(key, known) for key in flat if key not in known]
        problems += [p for key, value in flat.items() if (p := impossible(key, value))]
        flat = without_others(flat, flat.get("strategy.name", known["strategy.name"]))
        good = {key: value for key, value in flat.items() if key in known}
        tree: dict[str, Any] = {}
        for key, value in good.items():
            *path, last = key.replace("-", "_").split(".")
            table = tree
            for part in path:
                table = table.setdefault(part, {})
            table[last] = value
        sections = cls.model_fields
        built: dict[str, Any] = {}
        for name in sections:
            section = strategy_section() if name == "strategy" else sections[name].annotation
            assert section is not None
            try:
                built[name] = section(**tree.get(name, {}))
            except ValidationError as e:
                problems += [_problem(name, error, flat) for error in e.errors()]
        if problems:
            raise ConfigError(problems)
        return cls(**{**built, **_resolved(built, flat)})

    @classmethod
    def load(
        cls,
        path: Path | str,
        overrides: Mapping[str, Any] | None = None,
        beside: Collection[str] = (),
    ) -> "Config":
        """Read an experiment file, with `key = value` overrides on top, as `read` does.

        Of a Flower app's pyproject.toml that is its [tool.flwr.app.config].

        beside: tables of the file that are no part of the config.
        """
        given, _ = read_toml(path)
        own = {name: table for name, table in of_app(given).items() if name not in beside}
        try:
            flat = dict(_flatten(own))
        except RecursionError:
            raise ConfigError([f"{path}: its tables are too deep"]) from None
        try:
            return cls.read({**flat, **(overrides or {})})
        except ConfigError as e:
            raise ConfigError(e.problems, where_to_mend(path)) from None

    def flat(self) -> dict[str, Scalar]:
        """Every key, dotted, as Flower's run config takes it: the inverse of `read`."""
        left = {"strategy": strategy_tables(self.strategy)}
        return _dotted({**self.model_dump(), **left})

    def for_modules(self, modules: int) -> "Config":
        """The same with the rate for so many adapted modules, where it was left to the strategy.

        A config does not know how many its model has: until then it has the rate for many.
        """
        if BY_MODULES not in self.run.defaults:
            return self
        own = strategy_defaults(self.strategy.name)
        lr, _ = rate_of(self.train, self.model, self.lora, self.privacy, own, modules)
        run = self.run.model_copy(update={"defaults": decided(self.run.defaults, lr)})
        train = self.train.model_copy(update={"lr": lr})
        return self.model_copy(update={"run": run, "train": train})

    def identity(self) -> str:
        """A digest of all that decides a run's results: equal on its server and its clients."""
        return self.digest()[:16]

    def digest(self) -> str:
        """The same, as long as no two configs are found that have one: for who trusts no server."""
        decides = {k: v for k, v in self.flat().items() if not k.startswith(NOT_THE_EXPERIMENT)}
        return hashlib.sha256(repr(sorted(decides.items())).encode()).hexdigest()

    def toml(self) -> str:
        """Every key as a TOML file: what a run's directory keeps."""
        tree: dict[str, Any] = {}
        for key, value in self.flat().items():
            *path, last = key.split(".")
            table = tree
            for part in path:
                table = table.setdefault(part, {})
            table[last] = value
        return tomli_w.dumps(tree)

    def build_strategy(self) -> Strategy[Any]:
        """The strategy that the config names, with its options, as it runs the config's form.

        Raises:
            ConfigError: it lacks a method, say one that it says it needs with these options.
        """
        name: str = self.strategy.name
        try:
            built = registry.build(list_strategies()[name], strategy_options(self.strategy))
        except StrategyError as e:
            raise ConfigError([f"strategy.name = {name!r}: {e}"]) from None
        form = forms.FORMS.get(self.lora.form)  # no such form: preflight says so
        return forms.for_form(form, built) if form else built


def of_app(given: dict[str, Any]) -> dict[str, Any]:
    """The config in a Flower app's pyproject.toml; what is no such file is as it was."""
    inner: Any = given
    for name in ("tool", "flwr", "app", "config"):
        inner = inner.get(name) if isinstance(inner, dict) else None
    return inner if isinstance(inner, dict) else given


def strategy_defaults(name: str) -> Defaults:
    """What the strategy of this name declares: fedlora/strategies/defaults.py."""
    return defaults_of(list_strategies()[name])


def _resolved(built: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """The sections with what depends on other keys filled in, and a record of it."""
    name, private = built["strategy"].name, built["privacy"]
    own = strategy_defaults(name)
    train, model, lora = resolve_defaults(
        built["train"], built["model"], built["lora"], private, own
    )
    values = {"train.lr": train.lr, "lora.alpha": lora.alpha, "lora.init": lora.init}
    usual, rule = rate_of(train, model, lora, private, own)
    few, _ = rate_of(train, model, lora, private, own, modules=1)
    gave = recorded(flat, name, values, rule in RULES, few != usual)
    run = built["run"].model_copy(update={"defaults": gave})
    return {"run": run, "train": train, "model": model, "lora": lora}


def where_to_mend(path: Path | str) -> str:
    """What an error says to do about the keys of a file."""
    return f"Fix {path}, or override with --set key=value."


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """["train.lr=1e-3", "run.name=x"] as keys and values; values read as TOML, else as text."""
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise CommandError([f"--set {pair}: must be key=value"])
        try:
            overrides[key.strip()] = tomllib.loads(f"v = {text}")["v"]
        except (ValueError, RecursionError):  # no TOML, or a number of too many digits
            overrides[key.strip()] = text.strip()
    return overrides


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.lru_cache(maxsize=16)
def _defaults(strategies: type[BaseModel]) -> Mapping[str, Scalar]:
    """Every key and its default, with the options of the strategies that are known by now.

    Made once for them, since a message's handler reads a config."""
    return MappingProxyType(_dotted(Config(strategy=strategies()).model_dump()))


def _dotted(tree: Mapping[str, Any]) -> dict[str, Scalar]:
    return {key.replace("_", "-"): _scalar(value) for key, value in _flatten(tree)}


def _scalar(value: Any) -> Scalar:
    if isinstance(value, tuple | list):
        tables = [part for part in value if isinstance(part, dict)]
        return flat_sites(tables) if tables else flat_list(value)
    scalar: Scalar = value
    return scalar


def _unknown(key: str, known: Mapping[str, Scalar]) -> str:
    near = difflib.get_close_matches(key, known, n=1) or [
        k for k in known if k.split(".")[-1] == key.split(".")[-1]
    ]
    return f"{key[:80]}: no such key" + (f'; did you mean "{near[0]}"?' if near else "")


def _problem(section: str, error: Any, flat: Mapping[str, Any]) -> str:
    path, loc = [section], error["loc"]
    for part, below in zip(loc, (*loc[1:], 0), strict=True):
        if isinstance(part, str):
            path.append(part.replace("_", "-"))
        elif isinstance(below, str):  # a table of a list
            path[-1] += f"[{part}]"
    key = ".".join(path)
    return f"{key} = {flat.get(key, error.get('input'))!r}: {said(error)}"
