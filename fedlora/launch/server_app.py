"""The ServerApp: read and check the config, build the server, start it."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config.reader import Config
from fedlora.federation.server.allocator import keep_freed_memory
from fedlora.launch.federation import Federation
from fedlora.reports.console import Progress

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A whole run; what cannot run is refused before the data or a model is loaded."""
    keep_freed_memory()
    config = Config.read(context.run_config)
    with Progress(config.run.rounds) as observer:
        Federation(config, observer).start(grid)
