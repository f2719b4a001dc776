"""Strategies that others add: by a call, or by an installed package's entry point.

    register_strategy("mine", Mine, states=(State,))      in the process that reads the config

    [project.entry-points."fedlora.strategies"]           in a package's own pyproject.toml
    mine = "their_package.mine:Mine"

An entry point names the class, or a function without arguments that calls `register_strategy`.
It is loaded in every process that asks for a strategy; a call counts in its own process, and in
the workers that a simulation forks from it.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

from fedlora.errors import StrategyError
from fedlora.strategies.base import Needs, Promise, Strategy, begins, collects
from fedlora.strategies.chosen import chooses
from fedlora.strategies.defaults import BringsDefaults, Defaults

GROUP = "fedlora.strategies"
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
TAKEN = {"name", "copy", "json", "dict", "schema", "validate", "construct"}
"""What a table of options cannot be called: the section `strategy` has these itself."""

KEPT = {"Saved", "Member", "Version", "BaseLog", "Client", "Layer", "Moments", "Factors", "Pair",
        "Stack"}  # fmt: skip
"""What else a checkpoint may hold, where types are known by their names."""

Classes = Mapping[str, type[Strategy[Any]]]


@dataclass(frozen=True)
class Added:
    """One strategy that was added, and the types of its state that its module does not name."""

    cls: type[Strategy[Any]]
    states: tuple[type, ...] = ()


@dataclass
class Registry:
    """What was added so far in this process."""

    added: dict[str, Added]
    broken: list[str]
    looked: bool = False


REGISTRY = Registry({}, [])


def add(name: str, cls: type[Strategy[Any]], states: Sequence[type], own: Classes) -> None:
    """Add a strategy; the same once more changes nothing. `own` are those of fedlora itself.

    Raises:
        StrategyError: the name is none or is taken, the class lacks something, a state is no
            dataclass. All that is wrong with it is in one message.
    """
    look(own)
    new = Added(cls, tuple(states))
    if REGISTRY.added.get(name) == new:
        return
    if found := [*_of_name(name, own), *_of_class(cls), *_of_states(states)]:
        raise StrategyError(_listed(f"the strategy {name!r} cannot be registered", found))
    REGISTRY.added[name] = new


def added(own: Classes) -> dict[str, type[Strategy[Any]]]:
    """Name to class of what was added, by call or by an installed package."""
    look(own)
    return {name: x.cls for name, x in REGISTRY.added.items()}


def broken_packages() -> tuple[str, ...]:
    """For each installed strategy that could not be loaded, a sentence with its package's name."""
    return tuple(REGISTRY.broken)


def states_of(strategy: Strategy[Any]) -> tuple[type, ...]:
    """The state types that its class was registered with."""
    return tuple(t for x in REGISTRY.added.values() if x.cls is type(strategy) for t in x.states)


def build(cls: type[Strategy[Any]], options: Mapping[str, Any]) -> Strategy[Any]:
    """The strategy with these options.

    Raises:
        StrategyError: the class lacks something of the protocol, or of what it says it needs.
    """
    if found := _of_class(cls):
        raise StrategyError(_listed(f"{cls.__name__} is no strategy", found))
    strategy = cls(**options)
    begins(strategy)
    collects(strategy)
    chooses(strategy)
    return strategy


def look(own: Classes) -> None:
    """Load what installed packages add, the first time that anybody asks."""
    if REGISTRY.looked:
        return
    REGISTRY.looked = True  # first: an entry point may itself call register_strategy
    for point in sorted(entry_points(group=GROUP)):
        try:
            _load(point, own)
        except Exception as e:  # whatever a stranger's module raises as it is imported
            package = point.dist.name if point.dist else "an installed package"
            REGISTRY.broken.append(
                f"the package {package} offers a strategy {point.name!r} ({point.value}) that "
                f"cannot be loaded: {type(e).__name__}: {e}. Mend the package, or uninstall it"
            )


def _load(point: EntryPoint, own: Classes) -> None:
    found = point.load()
    if isinstance(found, type):
        add(point.name, found, (), own)
    else:
        found()


# -- what is wrong with one ---------------------------------------------------------------------


def _listed(what: str, problems: Sequence[str]) -> str:
    return what + ":" + "".join(f"\n  {p}" for p in problems)


def _of_name(name: str, own: Classes) -> Iterator[str]:
    if not NAME.fullmatch(name) or name in TAKEN or name.startswith("model-"):
        yield f"its name {name!r}: must be small letters, digits and single hyphens, as lora-a2"
    elif name in own or name in REGISTRY.added:
        cls = own[name] if name in own else REGISTRY.added[name].cls
        yield f"its name is taken by {cls.__module__}.{cls.__qualname__}; choose another"


def _of_states(states: Sequence[type]) -> Iterator[str]:
    for x in states:
        if not (isinstance(x, type) and is_dataclass(x)):
            yield f"states: {x!r} must be a dataclass, since a checkpoint keeps fields by name"
        elif x.__name__ in KEPT:
            yield f"states: {x.__name__} is a name of fedlora's own in a checkpoint; choose another"


def _of_class(cls: Any) -> tuple[str, ...]:
    if not isinstance(cls, type):
        return (f"{cls!r} must be a class: its fields are options, which the config gives",)
    return _of_type(cls)


@lru_cache(maxsize=256)
def _of_type(cls: type[Any]) -> tuple[str, ...]:
    """What the class lacks of the protocol, a sentence for each."""
    missing, options = tuple(_methods(cls)), tuple(_options(cls))
    return (*missing, *options) if missing or options else tuple(_answers(cls()))


def _methods(cls: type) -> Iterator[str]:
    name = cls.__name__
    for method, declared in vars(Strategy).items():
        if method.startswith("_"):
            continue
        if isinstance(declared, property):
            if not hasattr(cls, method):
                yield f"{name} has no {method}: write it as a property"
            continue
        wanted = [p for p in inspect.signature(declared).parameters if p != "self"]
        call = f"{method}({', '.join(wanted)})"
        found = getattr(cls, method, None)
        if method == "needs" and found is None and hasattr(cls, "requires"):
            yield f"{name}.requires is not read: write `def needs(self) -> Needs` in its place"
        elif not callable(found):
            yield f"{name} has no {call}: see fedlora/strategies/base.py"
        elif not _takes(found, 1 + len(wanted)):
            yield f"{name}.{method} must be callable as {call}"


def _takes(function: Any, count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True


def _options(cls: type) -> Iterator[str]:
    if not is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        yield f"{cls.__name__} must be a frozen dataclass: its fields are its options"
        return
    for f in fields(cls):
        if not isinstance(f.default, bool | int | float | str):
            yield f"{cls.__name__}.{f.name} must have a default that is a number, bool or text"
        if f.name.startswith(("_", "model_")) or f.name in TAKEN - {"name"}:
            yield f"{cls.__name__}.{f.name}: an option cannot have this name; choose another"


def _answers(strategy: Strategy[Any]) -> Iterator[str]:
    name = type(strategy).__name__
    if not isinstance(strategy.needs(), Needs):
        yield f"{name}.needs() must return Needs(...) of fedlora.strategies.base"
    if strategy.promise not in get_args(Promise):
        yield f"{name}.promise must be one of {', '.join(get_args(Promise))}"
    cls: Any = type(strategy)
    if isinstance(cls, BringsDefaults):
        found: Any = cls.defaults
        if not isinstance(found, Defaults):
            yield f"{name}.defaults must be Defaults(...) of fedlora.strategies.defaults"
        else:
            yield from (f"{name}.defaults: {problem}" for problem in found.problems())
