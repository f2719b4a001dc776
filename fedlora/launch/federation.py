"""A federation in a ServerApp of one's own.

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    Federation(Config.read(context.run_config)).start(grid)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedlora import preflight
from fedlora.config.metric_names import names_of
from fedlora.config.origins import RECORD, origin
from fedlora.config.reader import Config
from fedlora.errors import StrategyError
from fedlora.federation.server.loop import FederatedLora as Server
from fedlora.reports.console import Observer, Silent, together
from fedlora.strategies import Strategy, list_strategies
from fedlora.training.user_code import name_of


class Federation:
    """Runs the config's federated LoRA algorithm on a Flower grid.

    strategy: an object, or a registered class, in place of the one that the config names.
    model, tokenizer, data, loss, metrics: the user's own, each a function of a module or its name,
    "package.module:function"; see fedlora/training/user_code.py. They go into the config and to the
    clients, whose app names them too (`make_client_app`). The config itself is the one that Flower
    gives the clients as well, `Config.read(context.run_config)`: they refuse another.
    observers: told of each round as it ends.

    >>> from fedlora import Config
    >>> def main(grid, context):
    ...     return Federation(Config.read(context.run_config)).start(grid)
    """

    def __init__(
        self,
        config: Config,
        observer: Observer | None = None,
        *,
        strategy: Strategy[Any] | type[Strategy[Any]] | None = None,
        model: Any = None,
        tokenizer: Any = None,
        data: Any = None,
        loss: Any = None,
        metrics: Any = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Checks the config, and loads its data and model.

        Raises:
            ConfigError: it cannot run; with all the reasons, before anything is loaded.
            StrategyError: the strategy is not registered.
        """
        self.config = with_own(config, strategy, model, tokenizer, data, loss, metrics)
        preflight.check(self.config)
        was, now = config.flat(), self.config.flat()
        given = now[RECORD]  # what a strategy gave goes along; what a user set, a client must know
        changes = {k: v for k, v in now.items() if v != was[k] or origin(given, k, v)}
        self._server = Server(self.config, together([observer or Silent(), *observers]), changes)

    def start(self, grid: Grid) -> Result:
        """Run to the end: see `FederatedLora.start`. `Result.arrays` is the final adapter."""
        return self._server.start(grid)


FederatedLora = Federation
"""The name that this had in `fedlora.server` of 0.1, where it checked its config too."""


def with_own(
    config: Config,
    strategy: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    loss: Any = None,
    metrics: Any = None,
) -> Config:
    """The config with what is given in the place of what its keys name.

    Raises:
        ConfigError: a text is no "package.module:function".
        StrategyError: the strategy is not registered.
    """
    own = {
        "model.path": model,
        "model.tokenizer": tokenizer,
        "data.path": data,
        "train.loss": loss,
        "evaluate.metrics": metrics,
    }
    changed: dict[str, Any] = {key: name_of(x) for key, x in own.items() if x is not None}
    if metrics is not None:  # beside those that the config names
        changed["evaluate.metrics"] = [*names_of(config.evaluate.metrics), name_of(metrics)]
    if strategy is not None:
        changed |= _chosen(strategy)
    return Config.read({**config.flat(), **changed}) if changed else config


def _chosen(strategy: Any) -> dict[str, Any]:
    """The keys that name a strategy, and its options where an object has them."""
    if isinstance(strategy, str):
        return {"strategy.name": strategy}
    cls = strategy if isinstance(strategy, type) else type(strategy)
    name = next((n for n, known in list_strategies().items() if known is cls), None)
    if name is None:
        raise StrategyError(
            f"{cls.__name__} is not registered, so no client could build it; "
            f'register_strategy("{cls.__name__.lower()}", {cls.__name__}), where clients import it'
        )
    if strategy is cls:
        return {"strategy.name": name}
    options = dataclasses.asdict(strategy).items()
    return {"strategy.name": name} | {
        f"strategy.{name}.{option.replace('_', '-')}": value for option, value in options
    }
