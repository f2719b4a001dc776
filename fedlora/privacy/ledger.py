"""The privacy spent on a data set, in an append-only file that outlives the process.

    <root>/ledgers/<data>.jsonl      one line a round: q, sigma, C, steps, delta, and the chain
    <root>/known/<data>.json         that this ledger exists, its length and its head

`data` is a fingerprint of the rows themselves, so two runs over the same rows share one ledger
wherever their roots are the same. A line is on disk BEFORE the first step that it pays for.

Formal guarantee
    At any moment, killed or not, the epsilon of the file is at least that of everything that has
    left this client under this root. A round that is repeated is paid for again.

Edge cases
    killed before the line is whole    nothing was released; the torn line is charged all the same,
                                       as the dearer of the line before and the one that follows
    killed after it                    charged, though perhaps never released
    ledger gone, or shorter than the
    marker says                        PrivacyError: restore it; never a fresh start
    a line changed or taken out        PrivacyError: the hash chain is broken
    two processes at once              a lock on the file; the second reads what the first wrote
    an empty directory                 a data set nobody has seen: starts at zero
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedlora.errors import BudgetSpent, PrivacyError
from fedlora.lora.tree_file import sync_directory, write_atomically
from fedlora.privacy.accounting import Spend, epsilon, in_words
from fedlora.version import __version__

START = "0" * 64


@dataclass(frozen=True, slots=True)
class Charge:
    """One line: a spend, and under what terms it was made."""

    spend: Spend
    clip: float
    delta: float
    unit: str = "example"
    adjacency: str = "add or remove one"
    run: str = ""
    round: int = 0
    noise: str = "system"
    """system, or "reproducible": then there is no privacy, whatever epsilon says."""

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
            "code": code_version(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    @classmethod
    def read(cls, x: dict[str, Any]) -> "Charge":
        return cls(
            Spend(float(x["q"]), float(x["sigma"]), int(x["steps"])),
            float(x["clip"]),
            float(x["delta"]),
            x["unit"],
            x["adjacency"],
            x["run"],
            int(x["round"]),
            x["noise"],
        )


@dataclass(frozen=True, slots=True)
class Contents:
    """A ledger as read: its charges, the head of the chain, and a last line that was torn."""

    charges: tuple[Charge, ...] = ()
    head: str = START
    torn: str = ""
    heads: tuple[str, ...] = field(default=(), repr=False)

    def epsilon(self, delta: float, *more: Spend) -> float:
        """Of all the charges and `more`; a torn line counts as the dearer of its neighbours."""
        spends = [c.spend for c in self.charges]
        if self.torn:
            near = [*spends[-1:], *more[:1]]
            spends += [max(near, key=lambda s: epsilon([s], delta))] if near else []
        return epsilon([*spends, *more], delta)


class Ledger:
    """One data set's ledger below a root directory."""

    def __init__(self, root: Path, data: str) -> None:
        self.path = root / "ledgers" / f"{data}.jsonl"
        self.marker = root / "known" / f"{data}.json"

    def read(self) -> Contents:
        """Every charge so far.

        Raises:
            PrivacyError: the ledger is gone, cut short or changed.
        """
        known = self._known()
        if not self.path.exists():
            if known:
                raise PrivacyError(
                    f"the privacy ledger {self.path} is gone, but this data set was trained on "
                    f"before ({known['records']} charges, says {self.marker}); restore it from a "
                    "backup. Without it nobody knows what was spent, so nothing is trained"
                )
            return Contents()
        contents = read_ledger(self.path)
        n = known.get("records", 0)
        if n and (len(contents.heads) < n or contents.heads[n - 1] != known["head"]):
            raise PrivacyError(
                f"the privacy ledger {self.path} is older than what was spent: it has "
                f"{len(contents.heads)} records, and record {n} must have hash "
                f"{known['head'][:12]} ({self.marker}); restore the newest copy"
            )
        return contents

    def afford(self, charge: Charge, budget: float = 0.0) -> float:
        """The total epsilon with this charge; nothing is written.

        Raises:
            BudgetSpent: it would exceed the budget (0: none).
            PrivacyError: the ledger cannot be trusted.
        """
        return self._within(self.read(), charge, budget)

    def reserve(self, charge: Charge, budget: float = 0.0) -> float:
        """Write the charge, which is on disk when this returns; the total epsilon with it.

        Raises:
            BudgetSpent: it would exceed the budget (0: none). Nothing was written.
            PrivacyError: the ledger cannot be trusted.
        """
        with self._locked():
            contents = self.read()
            after = self._within(contents, charge, budget)
            if contents.torn:
                contents = self._heal(contents, charge)
            self._append(contents, charge.record())
        return after

    def _within(self, contents: Contents, charge: Charge, budget: float) -> float:
        after = contents.epsilon(charge.delta, charge.spend)
        if budget and after > budget * (1 + 1e-9):
            spent = contents.epsilon(charge.delta)
            raise BudgetSpent(
                f"the privacy budget is spent: epsilon is {in_words(spent)}, and "
                f"{charge.spend.steps} steps more make {in_words(after)}, above the limit of "
                f"{budget:g} at delta = {charge.delta:g} ({self.path}); nothing was trained"
            )
        return after

    def _heal(self, contents: Contents, charge: Charge) -> Contents:
        """Put the torn line on record, and charge for it."""
        near = [*contents.charges[-1:], charge]
        dearest = max(near, key=lambda c: epsilon([c.spend], charge.delta))
        self._append(contents, {**dearest.record(), "torn": _digest(contents.torn)})
        return read_ledger(self.path)

    def _append(self, contents: Contents, record: dict[str, Any]) -> None:
        line, head = sealed({**record, "n": len(contents.heads) + 1, "before": contents.head})
        new = not self.path.exists()
        with self.path.open("a+b") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
            ended = f.read(1) in (b"", b"\n")
            f.write((b"" if ended else b"\n") + line.encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        if new:
            sync_directory(self.path.parent)
        state = {"records": len(contents.heads) + 1, "head": head}
        write_atomically(self.marker, json.dumps(state).encode())

    def _known(self) -> dict[str, Any]:
        try:
            found = json.loads(self.marker.read_text())
            return {"records": int(found["records"]), "head": str(found["head"])}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError) as e:
            raise PrivacyError(f"{self.marker} is damaged ({e}); restore it and the ledger") from e

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            yield


def read_ledger(path: Path) -> Contents:
    """A ledger file, its chain checked.

    Raises:
        PrivacyError: a line is not what its hash says, or not where it was.
    """
    charges: list[Charge] = []
    heads: list[str] = []
    head = START
    torn: list[str] = []  # lines that do not open: the next record must pay for them
    lines = path.read_bytes().decode(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        record = opened(line)
        if record is None:
            torn += [line] if line or number < len(lines) else []
            continue
        if record["before"] != head or record["n"] != len(heads) + 1:
            raise _changed(path, number)
        if record.get("torn") != (_digest("\n".join(torn)) if torn else None):
            raise _changed(path, number)
        torn = []
        head = record["hash"]
        heads.append(head)
        charges.append(Charge.read(record))
    return Contents(tuple(charges), head, "\n".join(torn), tuple(heads))


def _changed(path: Path, number: int) -> PrivacyError:
    return PrivacyError(
        f"the privacy ledger {path} was changed or damaged at line {number}: its hash chain is "
        "broken; restore it from a backup"
    )


def sealed(record: dict[str, Any]) -> tuple[str, str]:
    """The record as a line that carries its own hash, and the hash."""
    body = json.dumps(record, sort_keys=True)
    digest = _digest(body)
    return json.dumps({**record, "hash": digest}, sort_keys=True), digest


def opened(line: str) -> dict[str, Any] | None:
    """The record of a line; None where the line is not what its hash says."""
    try:
        record = json.loads(line)
        digest = record["hash"]
        body = {key: value for key, value in record.items() if key != "hash"}
    except (ValueError, TypeError, KeyError):
        return None
    return record if _digest(json.dumps(body, sort_keys=True)) == digest else None


def fingerprint(columns: Iterable[Iterable[str]]) -> str:
    """A digest of a data set's rows, whatever their order."""
    rows = sorted(_digest("\x1f".join(row)) for row in columns)
    return _digest("\n".join(rows))[:32]


@functools.cache
def code_version() -> str:
    """fedlora's version, and a digest of the privacy code itself."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    return f"{__version__}+{digest[:12]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
