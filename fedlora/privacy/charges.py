"""A ledger's lines: what each charges, and the chain that they hang on.

    {"q": 0.1, "sigma": 1.2, "steps": 10, ..., "units": "9f2c...", "n": 7, "before": "...",
     "hash": HMAC-SHA256(key, the line without it)}

The key is the ledger's own, so who cannot read it can neither change a line nor write one.

Edge cases
    a line cut short         it opens nothing; the next record says so, and pays for it
    a file without a key     of the earlier format: its hashes are SHA-256 of the line
    a line that lacks a      what it says is in `OLDER`: dearer and of more clients, never less
    newer name
"""

import functools
import hashlib
import hmac
import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora.errors import PrivacyError
from fedlora.privacy.accounting import Spend, epsilon
from fedlora.privacy.units import ALL
from fedlora.version import __version__

START = "0" * 64
ANY_CLIENT = -1
OLDER: dict[str, Any] = {"units": ALL, "reading": "", "client": ANY_CLIENT}
"""What a line says that was written before these names were: of any units, and of any client."""


@dataclass(frozen=True, slots=True)
class Charge:
    """One line: a spend, under what terms it was made, and whose rows it was on."""

    spend: Spend
    clip: float
    delta: float
    unit: str = "example"
    adjacency: str = "add or remove one"
    run: str = ""
    round: int = 0
    noise: str = "system"
    """system, or "reproducible": then there is no privacy, whatever epsilon says."""
    units: str = ALL
    """The name of the set of units; ALL: any."""
    reading: str = ""
    """What those units are: see `Units.reading`."""
    client: int = ANY_CLIENT
    """Who trained. It is counted by, and never composed by: see `count`."""

    def record(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "adjacency": self.adjacency,
            "mechanism": "Poisson-subsampled Gaussian",
            "q": self.spend.q,
            "sigma": self.spend.sigma,
            "steps": self.spend.steps,
            "clip": self.clip,
            "delta": self.delta,
            "run": self.run,
            "round": self.round,
            "noise": self.noise,
            "units": self.units,
            "reading": self.reading,
            "client": self.client,
            "code": code_version(),
            "time": now(),
        }

    @classmethod
    def read(cls, x: dict[str, Any]) -> "Charge":
        x = {**OLDER, **x}
        return cls(
            Spend(float(x["q"]), float(x["sigma"]), int(x["steps"])),
            float(x["clip"]),
            float(x["delta"]),
            x["unit"],
            x["adjacency"],
            x["run"],
            int(x["round"]),
            x["noise"],
            x["units"],
            x["reading"],
            int(x["client"]),
        )


@dataclass(frozen=True, slots=True)
class Contents:
    """A ledger's file as read: its charges, the chain's head, and a last line that was torn."""

    charges: tuple[Charge, ...] = ()
    head: str = START
    torn: str = ""
    heads: tuple[str, ...] = field(default=(), repr=False)
    opening: dict[str, Any] = field(default_factory=dict, repr=False)
    """How the ledger began; {} in the earlier format."""
    lost: float = 0.0
    """Epsilon that was spent on records that are lost, by the operator's word: of any units."""

    def paid(self, *more: Charge) -> tuple[Charge, ...]:
        """The charges, with one for a torn line: the dearer of its neighbours, of any units."""
        if not self.torn or not (near := [*self.charges[-1:], *more[:1]]):
            return self.charges
        return (*self.charges, dearest(near))

    def count(self, run: str, client: int) -> int:
        """This client's charges of a run, and those that may be its. Clients of one ledger count
        apart, so what each is told does not depend on which of them was first."""
        of = {client, ANY_CLIENT}
        mine = (c for c in self.charges if c.run == run)
        return sum(client == ANY_CLIENT or c.client in of for c in mine)


def dearest(near: list[Charge]) -> Charge:
    """What a torn line may have been, whoever's rows it was for."""
    found = max(near, key=lambda c: epsilon([c.spend], near[-1].delta))
    return replace(found, units=ALL, reading="", client=ANY_CLIENT)


def read_ledger(path: Path, key: bytes = b"") -> Contents:
    """A ledger's file, its chain checked; without a key, one of the earlier format.

    What was read before is not parsed again, as long as its bytes are the same.

    Raises:
        PrivacyError: a line is not what its hash says, or not where it was.
    """
    data = path.read_bytes()
    size, digest, known = _read_before.get((path, key), (0, "", Contents()))
    if not size or len(data) < size or hashlib.sha256(data[:size]).hexdigest() != digest:
        size, known = 0, Contents()
    found = _parsed(path, key, known, data[size:])
    if not found.torn and data.endswith(b"\n"):
        if len(_read_before) > MOST_READ:
            _read_before.clear()
        _read_before[path, key] = (len(data), hashlib.sha256(data).hexdigest(), found)
    return found


MOST_READ = 64
_read_before: dict[tuple[Path, bytes], tuple[int, str, Contents]] = {}


def _parsed(path: Path, key: bytes, known: Contents, data: bytes) -> Contents:
    charges, heads, head = [*known.charges], [*known.heads], known.head
    opening, lost = known.opening, known.lost
    torn: list[str] = []  # lines that do not open: the next record must pay for them
    lines = data.decode(errors="replace").split("\n")
    for number, line in enumerate(lines, len(heads) + 1):
        record = opened(line, key)
        if record is None:
            torn += [line] if line or number < len(known.heads) + len(lines) else []
            continue
        wanted = digest("\n".join(torn)) if torn else None
        if (record["before"], record["n"], record.get("torn")) != (head, len(heads) + 1, wanted):
            raise _changed(path, number)
        torn = []
        head = record["hash"]
        heads.append(head)
        lost += float(record.get("recovered", 0.0))
        opening = record if "opened" in record else opening
        if "q" in record:
            charges.append(Charge.read(record))
    return Contents(tuple(charges), head, "\n".join(torn), tuple(heads), opening, lost)


def _changed(path: Path, number: int) -> PrivacyError:
    return PrivacyError(
        f"the privacy ledger {path} was changed or damaged at line {number}: its hash chain is "
        "broken; restore it from a backup"
    )


def sealed(record: dict[str, Any], key: bytes = b"") -> tuple[str, str]:
    """The record as a line that carries its own hash, and the hash."""
    found = digest(json.dumps(record, sort_keys=True), key)
    return json.dumps({**record, "hash": found}, sort_keys=True), found


def opened(line: str, key: bytes = b"") -> dict[str, Any] | None:
    """The record of a line; None where the line is not what its hash says."""
    try:
        record = json.loads(line)
        found = str(record["hash"])
        body = {name: value for name, value in record.items() if name != "hash"}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    same = hmac.compare_digest(digest(json.dumps(body, sort_keys=True), key), found)
    return record if same else None


def digest(text: str, key: bytes = b"") -> str:
    """HMAC-SHA256 under the key; without one, SHA-256."""
    data = text.encode(errors="replace")
    return hmac.digest(key, data, "sha256").hex() if key else hashlib.sha256(data).hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache
def code_version() -> str:
    """fedlora's version, and a digest of the privacy code itself."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    found = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    return f"{__version__}+{found[:12]}"
