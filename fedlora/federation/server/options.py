"""Which clients a config's options do not go with; asked of those that came."""

from collections.abc import Iterator, Sequence

from fedlora.federation.client import personalize as personal
from fedlora.federation.secure import rules as secure
from fedlora.federation.server import screening
from fedlora.federation.server.run import Setting
from fedlora.strategies import server_optimizers as server_opt
from fedlora.strategies.base import Client, uneven
from fedlora.strategies.forms import ONE_RANK


def refusals(setting: Setting, clients: Sequence[Client]) -> Iterator[str]:
    """Why the config's options do not go with its strategy or with each other."""
    config, strategy = setting.config, setting.strategy
    yield from setting.planner.problems(strategy)
    yield from screening.refusals(config, strategy)
    if setting.model.form.after and (gap := uneven(clients)):
        yield f"lora.form = {config.lora.form!r}, but {gap}: {ONE_RANK}"
    chosen = config.server.optimizer
    if chosen != "none" and (reason := server_opt.refusal(strategy)):
        yield f"server.optimizer = '{chosen}': {reason}"
    yield from personal.refusals(config)
    if config.secure.aggregation:
        yield from secure.alone(clients)
