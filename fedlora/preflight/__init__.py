"""Preflight: every reason why a run is impossible, in one list, before anything starts.

    problems(config)             what the config and its strategy alone can tell
    problems(config, clients)    and what these clients cannot do together
    check(config)                a ConfigError of them all, and of what its ranks cannot do together
    read(given), load(path)      the config, read and checked

The command, `fedlora doctor`, `fedlora compare` and the entry points of both apps ask; a node asks
of its own config before it answers. The server asks the second part once more, of the clients that
came (federation/server/admission.py), since a node may state a rank of its own. `Config` parses
one key at a time and knows nothing of this.
It loads no model and imports nothing that could, so that the command answers at once.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config.reader import Config, where_to_mend
from fedlora.errors import ConfigError
from fedlora.federation.server import admission
from fedlora.preflight import (
    experts,
    forms,
    hardware,
    options,
    privacy,
    secure,
    stop,
    tasks,
    together,
    training,
    user_code,
)
from fedlora.strategies.base import Client


def problems(config: Config, clients: Sequence[Client] | None = None) -> Iterator[str]:
    """Each reason why the config, or the config with these clients, cannot run; what to do."""
    strategy = config.build_strategy()
    yield from forms.problems(config, strategy)
    yield from experts.problems(config, strategy)
    yield from privacy.problems(config, strategy)
    yield from secure.problems(config, strategy)
    yield from options.problems(config, strategy)
    yield from stop.problems(config, strategy)
    yield from tasks.problems(config)
    yield from training.problems(config)
    yield from user_code.problems(config)
    yield from hardware.problems(config)
    if clients is not None:
        yield from admission.problems(config, strategy, clients)


def check(config: Config, clients: Sequence[Client] | None = None) -> None:
    """Check that the config, or the config with these clients, can run.

    Raises:
        ConfigError: it cannot; with all the problems there are.
    """
    if found := list(problems(config, clients)) or _together(config, clients):
        raise ConfigError(found)


def _together(config: Config, clients: Sequence[Client] | None = None) -> list[str]:
    """What clients of the config's ranks cannot do; of those that came the server finds out."""
    return [*together.problems(config, config.build_strategy())] if clients is None else []


def read(given: Mapping[str, Any]) -> Config:
    """A flat or nested mapping of keys as a config that can run.

    Raises:
        ConfigError: a key or a value is wrong, or together they cannot be.
    """
    config = Config.read(given)
    check(config)
    return config


def load(
    path: Path | str, overrides: Mapping[str, Any] | None = None, beside: Collection[str] = ()
) -> Config:
    """An experiment file, with overrides on top, as a config that can run.

    beside: tables of the file that are no part of the config.

    Raises:
        ConfigError: as `read`, or the file is none.
    """
    config = Config.load(path, overrides, beside)
    if found := list(problems(config)) or _together(config):
        raise ConfigError(found, where_to_mend(path))
    return config
