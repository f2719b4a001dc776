"""The ServerApp: read and check the config, build the server, start it."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config.reader import Config
from fedlora.federation.server.allocator import keep_freed_memory
from fedlora.launch.federation import Federation
from fedlora.launch.server_notes import noted
from fedlora.launch.server_record import recorded
from fedlora.reports.console import Progress
from fedlora.reports.observers import All

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A whole run; what cannot run is refused before the data or a model is loaded."""
    given = context.run_config
    results = Path(str(given.get("run.out", "")), str(given.get("run.name", ""))).resolve()
    with recorded(context.run_id, str(results)):
        keep_freed_memory()
        config = Config.read(given)
        with Progress(config.run.rounds) as observer:
            Federation(config, All(observer, noted(context.run_id))).start(grid)
