"""Runs a command so that its errors are said to a user in one paragraph, without a traceback."""

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from fedlora.errors import FedLoraError


def guarded(run: Callable[[], Any]) -> None:
    """Run it in an environment fit for federations; exit with 1 where a user's error stops it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in huge pages
    try:
        run()
    except FedLoraError as e:
        said = "\n".join([f"{type(e).__name__}: {e}", *getattr(e, "__notes__", [])])
        typer.secho(said, fg="red", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
