"""The server: read and check the config, build the strategy's host, start it."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora import preflight
from fedlora.federation.server.allocator import keep_freed_memory
from fedlora.federation.server.loop import FederatedLora
from fedlora.reports.console import Progress

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A whole run; what cannot run is refused before the data or a model is loaded."""
    keep_freed_memory()
    config = preflight.read(context.run_config)
    with Progress(config.run.rounds) as observer:
        FederatedLora(config, observer).start(grid)
