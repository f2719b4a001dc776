"""The server: read the config, build the strategy's host, start it. See fedlora/server.py."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config import Config
from fedlora.console import Progress
from fedlora.server import FederatedLora
from fedlora.warm_memory import keep_freed_memory

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    keep_freed_memory()
    config = Config.read(context.run_config)
    with Progress(config.run.rounds) as observer:
        FederatedLora(config, observer).start(grid)
