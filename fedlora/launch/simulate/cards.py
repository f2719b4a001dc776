"""A simulation's grid, with the workers that its config asks for: forked, or one a card.

    with grid_of(config, client_app) as grid: ...

A worker that is started anew knows nothing of this process: the user's own code goes there by its
names, and so does a strategy that a call registered. What has no name to import, an object or a
function of the script that was started, is refused before anything is.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from flwr.clientapp import ClientApp

from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.launch.simulate.grid import LocalGrid
from fedlora.launch.simulate.workers import CardWorker
from fedlora.strategies import registry
from fedlora.training import devices
from fedlora.training.user_code import is_live, name_of, named

MAIN = "py:__main__:"
"""How the name of what the script that was started defines begins: no other process has it."""


def card_workers(config: Config) -> list[CardWorker]:
    """The workers of a simulation that are started anew: one on each further card.

    None on the host, where workers are forked; but where the machine has a card, all but one.

    Raises:
        ConfigError: more workers are asked for than there are devices; or the user's own code is
            not to be had by a fresh process.
    """
    cards = devices.fresh(config.simulate.devices, workers_of(config))
    if not cards:
        return []
    code = dict(named(config))
    added = [*_added(config)]
    classes = {f"strategy.name = {x['name']!r}": x["cls"] for x in added}
    if found := [*_only_here({**code, **classes})]:
        raise ConfigError(found)
    return [CardWorker(str(card), [*code.values()], added) for card in cards]


def grid_of(
    config: Config,
    client_app: ClientApp,
    node_configs: Mapping[int, Mapping[str, Any]] | None = None,
) -> LocalGrid:
    """The grid of a simulation, with the workers that its config asks for.

    Raises:
        ConfigError: they cannot be had here.
    """
    cards = card_workers(config)
    asked = 1 if cards else workers_of(config)
    return LocalGrid(client_app, config.clients.count, config.flat(), asked, node_configs, cards)


def workers_of(config: Config) -> int:
    """Processes of a simulation in which clients train.

    Raises:
        ConfigError: as `devices.workers`.
    """
    spread = config.model.device_map != "none"
    return devices.workers(config.simulate.workers, config.simulate.devices, spread)


def _added(config: Config) -> Iterator[Mapping[str, Any]]:
    """The run's strategy, where a call registered it."""
    name = config.strategy.name
    if (known := registry.REGISTRY.added.get(name)) is not None:
        yield {"name": name, "cls": name_of(known.cls), "states": [*map(name_of, known.states)]}


def _only_here(code: Mapping[str, str]) -> Iterator[str]:
    for key, value in code.items():
        if is_live(value) or value.startswith(MAIN):
            yield (
                f"{key}: this is known to this process alone, and each further worker is a "
                "process of its own; put it into a module of its own and name a function of that, "
                "or set simulate.workers = 1"
            )
