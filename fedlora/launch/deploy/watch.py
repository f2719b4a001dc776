"""What became of a run's ServerApp: asked of its record, server_record.py, and of its process."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from fedlora.errors import DeployError
from fedlora.launch.deploy.log_lines import harmless
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.scripts import SERVERAPPS
from fedlora.launch.deploy.supervise import is_running
from fedlora.launch.server_record import Ending

SILENT = 30.0
"""Seconds without a pulse after which a ServerApp is given up. Its record is touched every 4 s, and
within 60 s of the last touch another is begun."""


class ServerWatch:
    """One run's ServerApp, seen from outside. Without a record nothing is known of it."""

    def __init__(self, plan: Plan, run_id: str) -> None:
        self.place, self.run_id = plan.server / SERVERAPPS, run_id
        self._beat, self._heard, self._noted = 0, time.monotonic(), 0

    @property
    def ending(self) -> Ending | None:
        """None: there is no record."""
        there = (e for e in Ending if (self.place / f"{self.run_id}.{e}").exists())
        return next(there, None)

    @property
    def error(self) -> str:
        """What the ServerApp says to its user of an error of its own; "" where it says nothing."""
        with suppress(FileNotFoundError, ValueError):
            found = json.loads((self.place / f"{self.run_id}.{Ending.FAILED}").read_text())
            return str(found.get("error", ""))
        return ""

    def notes(self) -> Iterator[str]:
        """What the ServerApp has noted since this was last asked: see server_notes.py."""
        with suppress(FileNotFoundError), (self.place / f"{self.run_id}.notes").open("rb") as file:
            file.seek(self._noted)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._noted += len(whole)
            for line in whole.splitlines():
                with suppress(ValueError):
                    yield harmless(str(json.loads(line)))

    def entry(self) -> dict[str, Any]:
        """What the record says of a process that has not said that it ended; else nothing."""
        try:
            found: dict[str, Any] = json.loads(self._running.read_text())
        except FileNotFoundError:
            return {}
        return found

    def lost(self) -> str:
        """What befell a ServerApp that has not ended by itself; "" where it answers."""
        if not (entry := self.entry()):
            return ""
        if not is_running(entry):
            return "was killed" if self._running.exists() else ""  # it may have ended just now
        with suppress(FileNotFoundError):
            if (beat := self._running.stat().st_mtime_ns) != self._beat:
                self._beat, self._heard = beat, time.monotonic()
        silent = time.monotonic() - self._heard > SILENT
        return f"did not answer for {SILENT:g} s" if silent else ""

    def why_again(self, status: str) -> str:
        """Why a run of this last status is to be begun again; "" where it is not."""
        if status.startswith("finished") and status != "finished:failed":
            return ""
        if self.ending == Ending.CUT_OFF:
            return "lost its SuperLink"
        given_up = "was given up by Flower" if self.ending == Ending.NONE else ""
        return self.lost() or (status == "finished:failed" and given_up) or ""

    def end(self) -> None:
        """Kill what is left of it: two ServerApps must never write one run's directory."""
        entry = self.entry()
        if is_running(entry):
            with suppress(ProcessLookupError):
                os.kill(entry["pid"], signal.SIGKILL)
            with suppress(psutil.NoSuchProcess):
                psutil.wait_procs([psutil.Process(entry["pid"])], timeout=10)

    @property
    def _running(self) -> Path:
        return self.place / f"{self.run_id}.{Ending.NONE}"


def check_alone(plan: Plan, results: Path) -> None:
    """Check that no ServerApp writes this run's directory.

    Raises:
        DeployError: one does; says which process.
    """
    for _, pid in going(plan, results):
        raise DeployError(
            f"{results}: this run is going on, in process {pid}; `fedlora deploy run "
            f"{plan.quoted} --resume` follows it, `fedlora deploy status {plan.quoted}` shows it"
        )


def going(plan: Plan, results: Path) -> Iterator[tuple[str, int]]:
    """Flower's id and the process of each ServerApp that writes this run's directory."""
    for run_id, entry in entries(plan):
        if entry.get("results") == str(results.resolve()) and is_running(entry):
            yield run_id, int(entry["pid"])


def entries(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """Flower's ids and the records of the ServerApps that have not said that they ended."""
    for path in (plan.server / SERVERAPPS).glob(f"*.{Ending.NONE}"):
        if entry := ServerWatch(plan, path.stem).entry():
            yield path.stem, entry
