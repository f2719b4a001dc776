"""The plan of a comparison: an experiment file, its [compare] table, the cells of its grid."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fedlora.config.fields import Section
from fedlora.config.toml_file import read_toml
from fedlora.errors import ConfigError
from fedlora.launch.experiment_file import find, load
from fedlora.launch.simulate.hostile import ATTACKS
from fedlora.reports.record_types import SummaryRecord, record_in
from fedlora.strategies import list_strategies
from fedlora.training.user_code import is_code

BESIDE = ("set", "hostile")
"""What a variant may say beside keys of the run."""
SEARCH_SEED = 1000
"""Of the runs that choose [compare.search]; a grid has seeds of its own."""
FRESH_SEEDS = (1001, 1002)
"""Of the runs that choose among the best of the first ones: the best of a search on one seed is in
part that seed's luck, so a winner is named by others."""
BEST = 2
"""So many of a search's combinations run again."""
OWN = "own"
"""As a rate: each strategy's default."""
SEARCH_ROWS = 0.1
"""The share of their rows that those runs are scored on, where the experiment has no validation
rows: their test rows choose nothing."""


@dataclass(frozen=True)
class Experiment:
    """A config file and its [compare] table."""

    path: Path
    claim: str
    """The comment that the file begins with."""
    strategies: Sequence[str]
    seeds: Sequence[int]
    settings: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Mapping[str, Any]]
    full: Mapping[str, Any]
    search: Mapping[str, Sequence[Any]]
    quick: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    """The variant that the others' scores are held against, strategy by strategy."""
    rates: Sequence[str | float] = ()
    """What train.lr is in the place of what the file says: OWN, or a number for all."""

    @classmethod
    def load(cls, name: str) -> "Experiment":
        """By path, or by the name of one that is shipped.

        Raises:
            ConfigError: it is not there, or its [compare] table has a key that is none.
        """
        path = find(name, also=["synthetic"])
        tables, text = read_toml(path)
        table = tables.get("compare", {})
        _check_types(path, table)
        comment = []
        for line in text.splitlines():
            if not line.startswith("#"):
                break
            if not line.startswith("#     fedlora "):
                comment.append(line.removeprefix("#").strip())
        variants = table.get("variants", {"": {}})
        inner = {f"variants.{name}.set": v.get("set", {}) for name, v in variants.items()}
        names = list_strategies()
        for where, given in {"set": table.get("set", {}), **inner}.items():
            if wrong := sorted(set(given) - set(names)):
                raise ConfigError(
                    [f"{path}: compare.{where}.{wrong[0]}: must be one of {', '.join(names)}"]
                )
        return cls(
            path,
            "\n".join(comment).strip(),
            table.get("strategies", list(names)),
            table.get("seeds", [0, 1, 2]),
            table.get("set", {}),
            variants,
            table.get("full", {}),
            table.get("search", {}),
            table.get("quick", {}),
            table.get("base", ""),
            table.get("rates", []),
        )

    def at_rates(self, rates: Sequence[str | float]) -> "Experiment":
        """The same at these rates, whatever it says of train.lr: the whole grid once for each.

        A base is that variant at the first of them.
        """
        if not rates:
            return self

        def without(keys: Mapping[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in keys.items() if k != "train.lr"}

        def named(variant: str, rate: str | float) -> str:
            lr = "own rate" if rate == OWN else f"lr {rate:g}"
            return " ".join(filter(None, (variant, lr if len(rates) > 1 else "")))

        variants = {
            named(name, rate): {
                **changes, "train.lr": 0.0 if rate == OWN else rate,
                "set": {s: without(keys) for s, keys in changes.get("set", {}).items()},
            }
            for rate in rates for name, changes in self.variants.items()
        }  # fmt: skip
        return replace(
            self, variants=variants, search=without(self.search),
            settings={s: without(keys) for s, keys in self.settings.items()},
            base=named(self.base, rates[0]) if self.base else "",
        )  # fmt: skip

    def small(self) -> "Experiment":
        """The same at the size of [compare.quick], as its full size, of its strategies and a seed.

        Raises:
            ConfigError: it has no such size.
        """
        if not self.quick:
            raise ConfigError([f"--quick: {self.path.name} has no [compare.quick]"])
        keys = {k: v for k, v in self.quick.items() if k != "strategies"}
        names = self.quick.get("strategies", self.strategies)
        return replace(self, full=keys, strategies=names, seeds=self.seeds[:1])


class CompareTable(Section):
    """The types of what [compare] may hold."""

    strategies: list[str] = Field(default=[])
    seeds: list[int] = Field(default=[])
    set: dict[str, dict[str, Any]] = Field(default={})
    variants: dict[str, dict[str, Any]] = Field(default={})
    full: dict[str, Any] = Field(default={})
    quick: dict[str, Any] = Field(default={})
    base: str = Field(default="")
    rates: list[Literal["own"] | Annotated[float, Field(gt=0)]] = Field(default=[])
    search: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default={})


def _check_types(path: Path, table: Any) -> None:
    """
    Raises:
        ConfigError: [compare] is no table, has a key that is none, or a value of another type.
    """
    if not isinstance(table, dict):
        raise ConfigError([f"{path}: compare = {table!r}: must be a table, [compare]"])
    known = [*CompareTable.model_fields]
    if wrong := sorted({*table} - {*known}):
        raise ConfigError([f"{path}: compare.{wrong[0]}: must be one of {sorted(known)}"])
    try:
        CompareTable(**table)
    except ValidationError as e:
        first = e.errors()[0]
        key, value = ".".join(map(str, first["loc"])), first["input"]
        message = first["msg"].replace("Input should be a valid", "must be a")
        raise ConfigError([f"{path}: compare.{key} = {value!r}: {message}"]) from None
    for name, changes in table.get("variants", {}).items():
        sets = changes.get("set", {})
        if not isinstance(sets, dict) or not all(isinstance(x, dict) for x in sets.values()):
            raise ConfigError([f"{path}: compare.variants.{name}.set: must be tables by strategy"])
        if (attack := changes.get("hostile")) is not None and attack not in ATTACKS:
            raise ConfigError(
                [f"{path}: compare.variants.{name}.hostile: must be one of {', '.join(ATTACKS)}"]
            )
    if (base := table.get("base", "")) and base not in table.get("variants", {}):
        raise ConfigError([f"{path}: compare.base = {base!r}: must be one of the variants"])


@dataclass
class Cell:
    """One run of the grid."""

    variant: str
    strategy: str
    seed: int
    directory: Path
    given: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    """Why it has no result, where it has none."""
    refused: bool = False
    """It cannot run as it is asked, as opposed to: it began, and died."""
    hostile: str = ""
    """What one of its clients does: launch/simulate/hostile.py."""
    searched: dict[str, Any] = field(default_factory=dict)
    """What `search` found best for its strategy and variant, of [compare.search]."""

    @property
    def name(self) -> str:
        values = [f"{key}={value}" for key, value in self.searched.items()]
        return " ".join(filter(None, (self.variant, self.strategy, *values, f"seed {self.seed}")))

    def beside(self, ending: str) -> Path:
        """A file next to the run's directory, whose own name may have a dot: train.lr=0.01."""
        return self.directory.with_name(f"{self.directory.name}.{ending}")

    @property
    def done(self) -> bool:
        path = self.directory / "summary.json"
        return path.is_file() and not record_in(SummaryRecord, path).get("stopped")


def chosen(strategies: str | None, experiment: Experiment) -> list[str]:
    """ "all", "a,b", or what the experiment says.

    Raises:
        ConfigError: one of them is none; lists those that are.
    """
    names = list(experiment.strategies)
    if strategies is not None:
        names = (
            [*list_strategies()] if strategies == "all" else strategies.replace(" ", "").split(",")
        )
    if wrong := [n for n in names if n not in list_strategies()]:
        raise ConfigError([f"--strategies: {wrong[0]} is none of {', '.join(list_strategies())}"])
    return names


def cells(
    experiment: Experiment,
    names: Sequence[str],
    seeds: Sequence[int],
    overrides: Mapping[str, Any],
    out: Path,
    full: bool,
) -> list[Cell]:
    """The grid, seed by seed, so that a grid that is stopped early compares like with like.

    Raises:
        ConfigError: with what the command sets, two variants are the same.
    """
    left: dict[str, str] = {}
    for variant, changes in experiment.variants.items():
        rest = repr(sorted((k, v) for k, v in changes.items() if k not in overrides))
        if rest in left:
            keys = ", ".join(sorted(set(overrides) & set(changes)))
            raise ConfigError(
                [f"--set {keys}: variants {left[rest]} and {variant} of {experiment.path.name} "
                 "differ in nothing else and would be one; edit them in a copy of the file"]
            )  # fmt: skip
        left[rest] = variant
    grid = []
    for seed in seeds:
        measured = False  # the baselines: of each seed, once
        for variant, changes in experiment.variants.items():
            for name in names:
                path = out / "cells" / (variant or "all") / name / f"seed-{seed}"
                given = {
                    **(experiment.full if full else {}),
                    **{key: value for key, value in changes.items() if key not in BESIDE},
                    **experiment.settings.get(name, {}),
                    **changes.get("set", {}).get(name, {}),
                    **overrides,
                    "strategy.name": name,
                    "run.seed": seed,
                    "run.out": str(path.parent),
                    "run.name": path.name,
                    "output.plots": False,
                    "simulate.workers": 1,
                }
                if measured:
                    given["evaluate.baselines"] = False
                else:
                    measured = can_run(experiment, given)
                attack = changes.get("hostile", "")
                grid.append(Cell(variant, name, seed, path, given, hostile=attack))
    return grid


def can_run(experiment: Experiment, given: Mapping[str, Any]) -> bool:
    """Is it no cell that is refused before it begins?"""
    try:
        load(experiment.path, given)
    except ConfigError:
        return False
    return True


def trials(
    experiment: Experiment, grid: Sequence[Cell], keys: Mapping[str, Sequence[Any]], out: Path
) -> dict[tuple[str, str], list[Cell]]:
    """By variant and strategy, a short run for each combination of the values to choose from."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in grid:
        if (cell.variant, cell.strategy) in found:
            continue
        try:
            config = load(experiment.path, cell.given)
        except ConfigError:
            continue  # the grid says so too, with the reason
        short, held = (config.run.rounds + 1) // 2, dict[str, Any]()
        if not config.data.validates and not is_code(config.data.path):
            held["data.validation-size"] = SEARCH_ROWS
        tests = 0 if held or config.data.validates else short
        mine = found[cell.variant, cell.strategy] = []
        for values in itertools.product(*keys.values()):
            searched = dict(zip(keys, values, strict=True))
            name = ",".join(f"{key}={value}" for key, value in searched.items())
            path = out / "search" / (cell.variant or "all") / cell.strategy / name
            given = {
                **cell.given, **searched, "run.rounds": short, "run.seed": SEARCH_SEED,
                "run.out": str(path.parent), "run.name": name, "evaluate.every": tests,
                "evaluate.clients": False, "evaluate.baselines": False,
                "personalize.epochs": 0.0, "personalize.alone": False, **held,
            }  # fmt: skip
            mine.append(
                replace(cell, seed=SEARCH_SEED, directory=path, given=given, searched=searched)
            )
    return found


def again(tried: Sequence[Cell], standing: Callable[[Cell], float]) -> list[Cell]:
    """The BEST of a search's trials on fresh seeds; none where there is no choice left to make."""
    if len(tried) < 2:
        return []
    best = sorted(tried, key=standing, reverse=True)[:BEST]
    found = []
    for cell, seed in itertools.product(best, FRESH_SEEDS):
        path = cell.directory.with_name(f"{cell.directory.name},seed={seed}")
        given = {**cell.given, "run.seed": seed, "run.name": path.name}
        found.append(replace(cell, seed=seed, directory=path, given=given))
    return found
