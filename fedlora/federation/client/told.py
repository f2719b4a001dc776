"""What a node tells a server of an error: a code, a fixed text, and no word of a row.

    on the user's own machine     the whole text, as in a simulation
    on a node                     the whole text in the node's own log; to the server

        - the text of an error that says itself that it may leave (`FedLoraError.public`), or else
        - a fixed text by its class, and which keys of the config it names
        - of a bug its class, and the file and line that raised it

An error's words hold whatever was read: a label, a row, a path of the node. So no text leaves
unless the line that raises it says that it may.

No torch here: client/dispatch.py answers without it.
"""

import errno
import logging
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from fedlora.errors import (
    BudgetSpent,
    CheckpointError,
    ClientMemoryError,
    ConfigError,
    DataError,
    FedLoraError,
    ModelError,
    NodeFileError,
    PrivacyError,
    StrategyError,
    UpdateError,
)

LOG = logging.getLogger("fedlora.node")
LOCAL = "the node's own log has the whole text"
FIXED: Mapping[type[FedLoraError], str] = {
    BudgetSpent: "the privacy budget of this node's data is spent",
    PrivacyError: "a privacy promise cannot be kept on this node; nothing was released",
    NodeFileError: "this node's own settings cannot be used",
    ConfigError: "this node cannot run these settings, or its own",
    DataError: "this node's rows cannot be read as the config asks",
    ModelError: "this node cannot load or adapt the model as the config asks",
    StrategyError: "the strategy cannot do on this node what the config asks",
    ClientMemoryError: "this node's memory of the run is gone, or is another run's",
    CheckpointError: "this node's memory of the run cannot be read",
    UpdateError: "this node cannot send what was asked for",
}
"""By class, the first that an error is of."""
SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
"""What a system refuses that says nothing of a node but that it is full."""
NAMES = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)+")


def told(error: Exception, own_machine: bool) -> str:
    """The words of an error reply; what is left out of them is in this process's log."""
    whole = f"{type(error).__name__}: {error}"
    if not isinstance(error, FedLoraError):
        whole += f" ({_raised_at(error)})"
    if own_machine or (isinstance(error, FedLoraError) and error.may_leave):
        return whole
    LOG.error("%s", whole, exc_info=None if isinstance(error, FedLoraError) else error)
    return f"{type(error).__name__}: {_fixed(error)}; {LOCAL}"


def _fixed(error: Exception) -> str:
    if isinstance(error, FedLoraError):
        text = next((x for c, x in FIXED.items() if isinstance(error, c)), "it failed on this node")
        named = ", ".join(_keys(str(error)))
        return f"{text} ({named})" if named else text
    if isinstance(error, OSError) and error.errno in SYSTEM:
        return f"{os.strerror(error.errno)} ({_raised_at(error)})"
    return f"a bug, or this machine ({_raised_at(error)})"


def _raised_at(error: Exception) -> str:
    if not (frames := traceback.extract_tb(error.__traceback__)):
        return "nowhere"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"


def _keys(text: str) -> Iterator[str]:
    """The config's own keys that are named in a text, each once: names that everybody knows."""
    known = _known()
    yield from dict.fromkeys(x for x in NAMES.findall(text) if x in known)


@cache
def _known() -> frozenset[str]:
    try:
        from fedlora.config.reader import Config
    except ImportError:  # then that is the error; it has to be answered all the same
        return frozenset()
    return frozenset(Config().flat())
