"""Which keys of a run's config are not what they would have been by themselves."""

from collections.abc import Mapping
from typing import Any

from fedlora.config.origins import RECORD, origin
from fedlora.errors import FedLoraError
from fedlora.reports.run_files import RunFiles
from fedlora.reports.tables import Grid, TableCell

DECIDE = ("strategy.name", "model.task")
"""Keys that others' defaults depend on."""


WRITTEN = (RECORD, "lora.places")
"""Keys that a run writes and nobody sets."""
LONGEST = 200
"""Characters of a value on a page."""


def changed(run: RunFiles) -> dict[str, Any]:
    """Key to default, of the keys that have another value: by the run's own strategy and task.

    A key that today's fedlora does not have is none of them.
    """
    usual = defaults({k: run.config[k] for k in DECIDE if k in run.config})
    record = run.config.get(RECORD, "")
    keys = (k for k, x in run.config.items() if k in usual and not origin(record, k, x))
    found = {k: usual[k] for k in keys if k not in WRITTEN and run.config[k] != usual[k]}
    lr = run.config.get("train.lr")
    if lr is not None and not origin(record, "train.lr", lr) and (rates := _by_modules(usual)):
        found["train.lr"] = rates
    return found


def _by_modules(usual: Mapping[str, Any]) -> str:
    """Both rates of a strategy whose rate is decided by the number of modules; "" of another."""
    from fedlora.config.reader import Config

    few = Config.read(usual).for_modules(1).train.lr
    return "" if few == usual["train.lr"] else f"{usual['train.lr']:g}, of few modules {few:g}"


def defaults(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every key where only these are given; those of no strategy where they are not known here."""
    from fedlora.config.reader import Config  # which reads every strategy

    try:
        return Config.read(given).flat()
    except FedLoraError:  # of a strategy or task from outside
        return Config().flat()


def first(run: RunFiles, found: Mapping[str, Any]) -> Grid:
    """The changed keys: value and default."""
    heads = ("key", "value", "default")
    rows = ((k, text(run.config[k]), text(x)) for k, x in found.items())
    return Grid.of([dict(zip(heads, map(TableCell, row), strict=True)) for row in rows])


def sections(run: RunFiles, found: Mapping[str, Any]) -> dict[str, list[tuple[str, str, bool]]]:
    """(key, value, is it changed?) of every key by section, the changed ones first."""
    made: dict[str, list[tuple[str, str, bool]]] = {}
    for key, value in run.config.items():
        section, _, name = key.partition(".")
        made.setdefault(section, []).append((name or section, _short(text(value)), key in found))
    return {name: sorted(rows, key=lambda row: not row[2]) for name, rows in made.items()}


def _short(said: str) -> str:
    """A value as a page has room for it: the places of a form are thousands of characters."""
    rest = len(said) - LONGEST
    return said if rest <= 0 else f"{said[:LONGEST]}... and {rest} characters more, in config.toml"


def text(value: Any) -> str:
    """A value as it stands in a TOML file, without the quotes of a text."""
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'
