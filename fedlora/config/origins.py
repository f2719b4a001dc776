"""Where a value of a config comes from, where a strategy gave it: `run.defaults`.

    ("fedsb", "train.lr=0.02", "lora.alpha=16.0")     the strategy, then what is from its defaults

With "by-modules" at its end the rate is that of a model with many adapted modules, and is decided
once the model is there: `Config.for_modules`.

It lies in the saved config: a report can say it, a resumed run keeps the value, and the same config
with another strategy takes that one's. A value that is no longer the one on record was set.
"""

from collections.abc import Mapping
from typing import Any

RECORD = "run.defaults"
BY_MODULES = "by-modules"
UNSET: Mapping[str, Any] = {"train.lr": 0.0, "lora.alpha": 0.0, "lora.init": "auto"}
"""The keys that a strategy has defaults of, each with the value that leaves it to them."""


def told(record: Any) -> tuple[str, frozenset[str]]:
    """The strategy that a `run.defaults` names, and what it gave, "key=value" each; of what is no
    record nothing, which the key's own rule refuses."""
    parts = record.split(",") if isinstance(record, str) else []
    if isinstance(record, list | tuple):
        parts = [*map(str, record)]
    return (parts[0], frozenset(parts[1:])) if parts else ("", frozenset())


def origin(record: Any, key: str, value: Any) -> str:
    """ "from fedsb's defaults", of a key whose value is on record as a strategy's; else ""."""
    name, gave = told(record)
    return f"from {name}'s defaults" if f"{key}={value}" in gave else ""


def without_others(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keys but for those that another strategy than `name` gave, as far as they still stand."""
    whose, gave = told(given.get(RECORD, ""))
    if whose == name:
        return {**given}
    stale = {RECORD, *(key for key in UNSET if f"{key}={given.get(key)}" in gave)}
    return {key: value for key, value in given.items() if key not in stale}


def decided(record: tuple[str, ...], lr: float) -> tuple[str, ...]:
    """The record of a config whose rate was left to the model, with the one that it has now."""
    lines = (f"train.lr={lr}" if x.startswith("train.lr=") else x for x in record)
    return tuple(x for x in lines if x != BY_MODULES)


def recorded(
    given: Mapping[str, Any],
    name: str,
    values: Mapping[str, Any],
    own_rate: bool,
    by_modules: bool,
) -> tuple[str, ...]:
    """The record of a config that was just resolved for the strategy `name`.

    given: the keys as they were set. values: what those of UNSET are now. own_rate: a rate that was
    left out is the strategy's, and not one that privacy or the optimizer decides. by_modules: with
    few modules it is another.
    """
    _, gave = told(given.get(RECORD, ""))
    found, open_ = [], False
    for key, empty in UNSET.items():
        said = f"{key}={values[key]}"
        left = given.get(key, empty) == empty and (own_rate or key != "train.lr")
        if left or said in gave:
            found.append(said)
            if key == "train.lr":
                open_ = by_modules if left else BY_MODULES in gave
    return (name, *found, *([BY_MODULES] if open_ else [])) if found else ()
