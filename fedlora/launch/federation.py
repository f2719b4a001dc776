"""A federation in a ServerApp of one's own.

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    Federation(Config.read(context.run_config)).start(grid)
"""

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.federation.server.loop import FederatedLora as Server
from fedlora.reports.console import Observer


class Federation:
    """Runs the config's federated LoRA algorithm on a Flower grid."""

    def __init__(self, config: Config, observer: Observer | None = None) -> None:
        """Checks the config, and loads its data and model.

        Raises:
            ConfigError: it cannot run; with all the reasons, before anything is loaded.
        """
        preflight.check(config)
        self._server = Server(config, observer)

    def start(self, grid: Grid) -> Result:
        """Run to the end: see `FederatedLora.start`. `Result.arrays` is the final adapter."""
        return self._server.start(grid)


FederatedLora = Federation
"""The name that this had in `fedlora.server` of 0.1, where it checked its config too."""
