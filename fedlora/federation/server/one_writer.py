"""One process at a time writes a run's directory.

Two would write their lines between each other's, and each take the other's unfinished files for
what a killed run left. The lock is the system's, so it ends with its process, however that ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fedlora.errors import CheckpointError
from fedlora.federation.server.places import check_place

NAME = ".lock"
PATIENCE = 5.0
"""Seconds that another process is waited for: workers of a run that was killed end by themselves,
once what they are computing is done, and hold its lock until then."""


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Within it this process alone writes the run in this directory; nothing stays of the lock.

    A file system that has no locks has none here either.

    Raises:
        CheckpointError: another process is at it, on this machine or, where the file system says
            so, on another.
    """
    check_place("run.out", directory)
    there = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / NAME)
    with suppress(NotImplementedError):
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise CheckpointError(
                f"{directory} is being written by another process; wait until it ends (a worker "
                "of a run that was killed does, after its client), or end it"
            ) from None
    try:
        yield
    finally:  # unlinked while it is held: filelock lets nobody have a lock whose file is gone
        with suppress(OSError):  # Windows lets no open file go
            (directory / NAME).unlink(missing_ok=True)
        lock.release()
        if not there:
            with suppress(OSError):  # it has a run in it
                directory.rmdir()
