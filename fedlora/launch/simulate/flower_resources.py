"""What Flower's engine is told of this machine: its processors, its cards, and a client's share.

Ray gives each process of a client its cards, and hides the others from it; where a client is said
to need none, it hides all. So the app's config names the kind of card alone, without numbers: what
a process sees is what Ray gave it, and one that was given none refuses, and never trains on the
host.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.config import processes
from fedlora.config.reader import Config
from fedlora.training import devices


@dataclass(frozen=True)
class Resources:
    """Of a run on Flower's engine."""

    options: str
    """For `flwr run --federation-config`."""
    environment: Mapping[str, str]
    """In which Ray and all of its processes see simulate.devices and no other card."""
    devices: str
    """simulate.devices, as the processes are to read it."""


def resources_of(config: Config) -> Resources:
    """simulate.workers processes (0: one a card, or a core) on simulate.devices.

    More processes than cards share them evenly, each with a base of its own there.

    Raises:
        ConfigError: no such devices, or some that cannot be told from the others.
    """
    asked, wanted = config.simulate.workers, config.simulate.devices
    cards = devices.found(wanted)
    options = f"num-supernodes={config.clients.count} client-resources-num-cpus=1"
    if devices.is_host(cards[0]):
        workers = processes.workers(asked)
        return Resources(f"{options} init-args-num-cpus={workers}", {}, wanted)
    environment = devices.visible(cards)
    workers = asked or len(cards)
    cards = cards[:workers]
    together = -(-workers // len(cards))  # on one card: Ray splits no process over two
    share = int(1e4 / together) / 1e4  # Ray counts in units of 1e-4; rounded up, one would not fit
    options += f" client-resources-num-gpus={share:g} init-args-num-cpus={workers}"
    options += f" init-args-num-gpus={len(cards)}"
    return Resources(options, environment, cards[0].type)
