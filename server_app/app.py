"""The server: read the config, build the strategy's host, start it."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config.reader import Config
from fedlora.federation.server.allocator import keep_freed_memory
from fedlora.federation.server.loop import FederatedLora
from fedlora.reports.console import Progress

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    keep_freed_memory()
    config = Config.read(context.run_config)
    with Progress(config.run.rounds) as observer:
        FederatedLora(config, observer).start(grid)
