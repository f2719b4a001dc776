"""What stands where a run's files are to be, or are taken from."""

import os
from collections.abc import Mapping
from pathlib import Path

from fedlora.errors import CheckpointError


def check_place(key: str, path: Path) -> None:
    """Check that the directory at path, the value of a config's key, is there or can be made.

    Raises:
        CheckpointError: it cannot; says what stands in the way.
    """
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise CheckpointError(f"{key}: {there} is no directory, so nothing can be kept in {path}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(f"{key}: {there} cannot be written, so nothing can be kept in {path}")


def check_own(path: Path, notes: Mapping[str, str]) -> None:
    """Check that a checkpoint is that of the round in its name.

    Raises:
        CheckpointError: it is another's, whole as it may be: an older one in its place, say.
    """
    if path.stem != f"round-{notes.get('round', '').zfill(5)}":
        raise CheckpointError(f"{path} holds another round: {notes.get('round', 'none')!r}")
