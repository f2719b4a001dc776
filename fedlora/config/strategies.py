"""The section `strategy`: a name, and one table of options for each strategy there is.

It is made when it is asked for, so a strategy that was registered meanwhile is in it.
"""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, BeforeValidator, create_model

from fedlora.config.fields import Section
from fedlora.strategies import STRATEGIES, list_strategies
from fedlora.strategies.registry import broken_packages


def strategy_section() -> type[BaseModel]:
    """The section's class: the name, and for each strategy known now a table of its options."""
    return _strategy_section(tuple(list_strategies().items()))


@lru_cache(maxsize=16)
def _strategy_section(known: tuple[tuple[str, type], ...]) -> type[BaseModel]:
    tables: dict[str, Any] = {}
    for name, cls in known:
        hints = get_type_hints(cls)
        options = {f.name: (hints[f.name], f.default) for f in fields(cls)}
        if options:
            table = create_model(f"{name}-options", __base__=Section, **options)  # type: ignore[call-overload]
            tables[_field(name)] = (table, table())
    tables["name"] = (Annotated[str, BeforeValidator(_strategy_name)], "fedex")
    return create_model("StrategyConfig", __base__=Section, **tables)


def _field(name: str) -> str:
    return name.replace("-", "_")


def _strategy_name(value: Any) -> Any:
    known = list(list_strategies())
    if value in known:
        return value
    *first, last = (repr(name) for name in known)
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    text = f"must be {', '.join(first)} or {last}{hint}"
    raise ValueError(". But ".join([text, *broken_packages()]))


def strategy_options(section: Any) -> dict[str, Any]:
    """The options of the strategy that the section names."""
    options: dict[str, Any] = section.model_dump().get(_field(section.name), {})
    return options


def strategy_tables(section: Any) -> dict[str, Any]:
    """The section as nested tables.

    A strategy from elsewhere that is not named, with its options at their defaults, is left out:
    so that a run of another strategy does not depend on the package being installed.
    """
    tree: dict[str, Any] = section.model_dump()
    names: Sequence[str] = [n for n in list_strategies() if n not in STRATEGIES]
    for field in (_field(n) for n in names if n != section.name):
        if field in tree and getattr(section, field) == type(section).model_fields[field].default:
            del tree[field]
    return tree
