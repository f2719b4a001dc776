"""What the doctor says: one finding each."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    level: Literal["ok", "note", "problem"]
    what: str
    do: str = ""
