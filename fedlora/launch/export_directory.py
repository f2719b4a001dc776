"""A directory that is there whole or not at all: written beside its place, then renamed."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.errors import ModelError

MARKER = "fedlora-export.json"
"""Says that a directory is an export, which another may take the place of."""


OWN = ("adapter", "checkpoint", "clients", "flower", "plots", "tables", "updates")
"""Directories of a run's that are its own, there or to come."""


def check_place(out: Path) -> None:
    """Nothing, where an export may be written here.

    Raises:
        ModelError: there is a file, or a directory of something else, or it is a run's own, or
            where this process is.
    """
    whole = out.resolve()
    if whole == Path.cwd() or whole in Path.cwd().parents:
        raise ModelError(
            f"--out {out or '.'}: the current directory is in there, and an export takes the place "
            "of a directory; name another, such as ./export"
        )
    if whole.name in OWN and (whole.parent / "rounds.jsonl").exists():
        raise ModelError(f"{out}: is the run's own {whole.name}/; name another directory")
    if out.is_dir() and (not any(out.iterdir()) or (out / MARKER).is_file()):
        return
    if out.exists() or out.is_symlink():
        raise ModelError(
            f"{out}: holds something that is no export of fedlora's (it has no {MARKER}), and "
            "stays as it is; name a directory that is not there, is empty or is an earlier export"
        )


@contextmanager
def placed(out: Path, what: dict[str, Any]) -> Iterator[Path]:
    """A directory to write, which takes the place of `out` where the block ends without an error.

    With an error nothing of it stays, and what was at `out` before is there as it was. `what` goes
    into the marker.

    Raises:
        ModelError: there is something else at `out`.
    """
    out = out.resolve()
    check_place(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    old = beside.with_name(f"{beside.name}.old")
    beside.mkdir()
    try:
        yield beside
        (beside / MARKER).write_text(json.dumps(what, indent=1) + "\n", "utf-8")
        check_place(out)
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(beside, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
