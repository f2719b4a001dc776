"""`fedlora simulate`: an experiment on LocalGrid, or on Flower's own simulation engine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora import report
from fedlora.config import Config
from fedlora.console import Progress, Silent, quiet_libraries
from fedlora.errors import FedLoraError


def local(path: Path, overrides: Mapping[str, Any], quiet: bool = False) -> Path:
    """Run on LocalGrid; the run's directory."""
    quiet_libraries()
    config = Config.load(path, overrides)

    import torch
    from flwr.app import Context, RecordDict
    from flwr.serverapp import ServerApp

    from client_app.app import app as client_app
    from fedlora.server import FederatedLora
    from simulations.grid import RUN_ID, LocalGrid

    torch.set_num_threads(os.cpu_count() or 1)
    directory = Path(config.run.out, config.run.name)
    workers = config.simulate.workers or os.cpu_count() or 1
    app = ServerApp()
    with Silent() if quiet else Progress(config.run.rounds) as observer:

        @app.main()
        def main(grid: Any, context: Context) -> None:
            FederatedLora(Config.read(context.run_config), observer).start(grid)

        run_config = config.flat()
        try:
            with LocalGrid(client_app, config.clients.count, run_config, workers) as grid:
                context = Context(RUN_ID, 0, {}, RecordDict(), dict(run_config))
                app(grid, context)
        except KeyboardInterrupt:
            observer.note(f"stopped; continue with: fedlora simulate --resume {directory}")
            raise
        except FedLoraError as e:
            if (directory / "checkpoint").exists():
                e.add_note(f"continue with: fedlora simulate --resume {directory}")
            raise
    return finish(directory, config.output.plots)


def finish(directory: Path, plots: bool) -> Path:
    """The report page and the summary table."""
    from rich.console import Console

    page = report.write(directory, plots)
    Console().print(report.summary_table(directory))
    Console().print(f"report: {page}")
    return directory


def flower(path: Path, overrides: Mapping[str, Any], quiet: bool = False) -> Path:
    """Run the same apps through `flwr run` on Ray, with its traps closed.

    Its own SuperLink on its own port and home, no dependency installation per run, and the run's
    status read from JSON: `flwr run` exits 0 also when a run fails.
    """
    config = Config.load(
        path, {**overrides, "run.out": str(Path(overrides.get("run.out", "runs")).resolve())}
    )
    del config
    raise NotImplementedError
