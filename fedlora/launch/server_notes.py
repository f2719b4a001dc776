"""A ServerApp's notes, a line each, for whoever follows its run from outside.

What befell the run and is no round's: a damaged checkpoint, a node that was not taken in, another
version. They are in <Flower's run id>.notes, beside its record: see server_record.py.
"""

import json
import os
from pathlib import Path

from fedlora.launch.server_record import PLACE
from fedlora.reports.console import Observer, Silent

NOTES = "notes"


class Noted(Silent):
    """An observer that writes each note to a file, whole when the next is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(text) + "\n")


def noted(run_id: int) -> list[Observer]:
    """An observer that keeps this run's notes; none where no place is named."""
    place = os.environ.get(PLACE)
    return [Noted(Path(place, f"{run_id}.{NOTES}"))] if place else []
