"""An experiment file: the tables of a run's config, and beside them those of commands of ours.

Wherever a command takes one, it takes a path, or the name of one that ships: `quickstart`.

[compare]    how `fedlora compare` varies the run: launch/compare/experiment.py
[audit]      what `fedlora privacy audit` measures: launch/lab/study.py
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora import preflight
from fedlora.config.older import missing
from fedlora.config.reader import Config
from fedlora.config.toml_file import read_toml
from fedlora.errors import CommandError

BESIDE = ("compare", "audit")
PACKAGE = Path(__file__).parents[1]
PLACES = (PACKAGE / "simulations/experiments", PACKAGE.parent / "simulations/experiments")
"""Of the experiments that ship: in the package in a wheel, beside it in a checkout."""


def shipped() -> dict[str, Path]:
    """The experiments that ship, by name; none in an app bundle, which carries code alone."""
    place = next((p for p in PLACES if p.is_dir()), PACKAGE)
    return {path.stem: path for path in sorted(place.glob("*.toml"))}


def find(name: Path | str, also: Sequence[str] = ()) -> Path:
    """The file by its path, else by its name where it is one that ships. A directory is no file.

    also: names that the caller takes and this does not, for the error.

    Raises:
        CommandError: neither; with the names, and the nearest.
    """
    path, known = Path(name), shipped()
    if os.path.exists(path) and not os.path.isdir(path):  # of any length
        return path
    if str(name) in known:
        return known[str(name)]
    names = [*known, *also]
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise CommandError([f"{name}: no such file, nor one of {', '.join(names)}{hint}"])


def load(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config of the experiment that `find` finds, with overrides on top; it can run.

    Raises:
        ConfigError: there is none, or it cannot, with all that is wrong.
    """
    return preflight.load(find(path), overrides, BESIDE)


def load_config(
    path: Path | str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Config:
    """The config of an experiment: a file, the name of one that ships, or a mapping of keys.

    >>> from fedlora import load_config
    >>> load_config("quickstart", {"run.rounds": 2}).run.rounds
    2

    Raises:
        ConfigError: there is no such file, or it cannot run; with all that is wrong.
    """
    config = unchecked(path, overrides)
    preflight.check(config)
    return config


def unchecked(
    path: Path | str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Config:
    """As `load_config`, whether or not it can run: objects of the user's may still come to it."""
    if isinstance(path, Mapping):
        return Config.read({**_dotted(path), **(overrides or {})})
    return parse(find(path), overrides)


def _dotted(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys, so that an override replaces the key that it names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        flat |= _dotted(value, f"{before}{key}.") if inner else {f"{before}{key}": value}
    return flat


def meant(path: Path | str) -> dict[str, Any]:
    """What the config that a run wrote means by the keys it lacks: config/older.py."""
    return missing(_dotted(read_toml(path)[0]))


def of_run(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config that a run wrote, whatever was the default of a key that it lacks."""
    return parse(path, {**meant(path), **(overrides or {})})


def parse(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The run's config, whether or not it can run: what a finished run was."""
    return Config.load(path, overrides, BESIDE)
