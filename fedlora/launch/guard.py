"""Prints a command's error to the user in one paragraph, without a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from fedlora.errors import FedLoraError


@contextmanager
def guarded() -> Iterator[None]:
    """An environment fit for federations; exits with 1 where a user's error stops what it holds."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in huge pages
    try:
        yield
    except FedLoraError as e:
        said = "\n".join([f"{type(e).__name__}: {e}", *getattr(e, "__notes__", [])])
        typer.secho(said, fg="red", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
