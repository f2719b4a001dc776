"""What a model's own code raises, as one line for its user."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from fedlora.errors import FedLoraError, ModelError
from fedlora.training.devices import OutOfMemory

SHOWN = 300
"""Letters of an error's own text."""


@contextmanager
def named(what: str) -> Iterator[None]:
    """Within it, whatever fails is a ModelError that says what raised it, and where in its code.

    Our own errors stay what they are, and so does a device that is full: a client tries again.
    """
    try:
        yield
    except (FedLoraError, OutOfMemory):
        raise
    except Exception as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise ModelError(f"{what} raises {in_short(e)} ({where})") from e


def in_short(error: Exception) -> str:
    """An error's kind and the first sentences of its text, in one line."""
    return f"{type(error).__name__}: {shorten(str(error), SHOWN, placeholder=' ...')}"
