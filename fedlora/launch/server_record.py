"""A ServerApp's record of itself: that it lives, and how it ended, for whoever watches over it.

It is one file, <Flower's run id>.<ending>, in the directory that FEDLORA_SERVERAPPS names; where
nothing is named there is none. A thread touches it every EVERY seconds: a process that is stopped,
or in native code that never lets go of Python, has no pulse. At the end it is renamed, which a full
disk allows, so that what is to be done next is decided by the ending and by no word of an error.
The words of an error for the user are in it too, for `fedlora deploy run` to say.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path

import psutil

from fedlora.errors import FedLoraError

PLACE = "FEDLORA_SERVERAPPS"
EVERY = 4.0
"""Seconds between two touches."""


class Ending(StrEnum):
    """How a ServerApp ended, as far as it could say itself."""

    NONE = "running"
    """It has not ended; or it was killed, and could not say so."""
    DONE = "done"
    FAILED = "failed"
    """An error of its own, which would come again."""
    CUT_OFF = "cut-off"
    """It lost its SuperLink, or was interrupted."""

    @classmethod
    def of(cls, error: BaseException) -> "Ending":
        """How a ServerApp ended that raised this.

        >>> from fedlora.errors import RoundError
        >>> Ending.of(RoundError("too few")), Ending.of(ConnectionResetError())
        (<Ending.FAILED: 'failed'>, <Ending.CUT_OFF: 'cut-off'>)
        """
        import httpx

        outside = (httpx.HTTPError, ConnectionError, TimeoutError)
        if isinstance(error, FedLoraError):
            return cls.FAILED
        if isinstance(error, outside) or not isinstance(error, Exception):
            return cls.CUT_OFF
        return cls.FAILED


@contextmanager
def recorded(run_id: int, results: str) -> Iterator[None]:
    """Keep the record while the body runs. results: the run's directory."""
    if not (place := os.environ.get(PLACE)):
        yield
        return
    path = Path(place, f"{run_id}.{Ending.NONE}")
    path.parent.mkdir(mode=0o700, exist_ok=True)
    me = {"pid": os.getpid(), "created": psutil.Process().create_time(), "results": results}
    path.with_suffix(".part").write_text(json.dumps(me))
    path.with_suffix(".part").replace(path)
    over = threading.Event()
    threading.Thread(target=_touch, args=(path, over), daemon=True).start()
    ending = Ending.DONE
    try:
        yield
    except BaseException as e:
        ending = Ending.of(e)
        if isinstance(e, FedLoraError):
            with suppress(OSError):  # a full disk
                path.write_text(json.dumps({**me, "error": f"{type(e).__name__}: {e}"}))
        raise
    finally:
        over.set()
        path.replace(path.with_suffix(f".{ending}"))


def _touch(path: Path, over: threading.Event) -> None:
    while not over.wait(EVERY):
        with suppress(FileNotFoundError):
            os.utime(path)
