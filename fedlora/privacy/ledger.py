"""The privacy spent on rows, in an append-only file that outlives the process and every run.

    <root>/ledgers/<name>/charges.jsonl    one line a round: q, sigma, steps, whose rows, the chain
    <root>/ledgers/<name>/units/           the sets of units that charges name: units.py
    <root>/ledgers/<name>/known.json       the file's length and its head
    <root>/ledgers/<name>/key              of the chain and the units, 32 bytes, its owner's alone
    <root>/ledgers/*.jsonl, known/         of the earlier format: read and charged, never written

A node has one ledger, whatever its runs are called and make of the rows. A charge composes with
every earlier one that has a unit in common with it; disjoint parts of one file do not compose. A
line is on disk BEFORE the first step that it pays for.

Formal guarantee
    At any moment, killed or not, and for every unit: the epsilon, at the delta that a charge was
    made at, of all that has left this node and was trained on that unit is at most the largest
    that `reserve` gave for a charge with it. For the charges that hold a unit all meet the last of
    them, and so were all composed there. A round that is repeated is paid for again. After a
    recovery the delta of what was lost comes on top.

Edge cases
    killed before the line is whole    nothing was released; the torn line is charged all the same,
                                       as the dearer of the line before and the one that follows
    killed after it                    charged, though perhaps never released
    part of the ledger gone, or it is
    shorter than the marker says       PrivacyError: restore it; never a fresh start
    a line changed or taken out        PrivacyError: the hash chain is broken
    a set of units gone or changed     its charges are of any units: dearer, never cheaper
    fewer charges of this run and
    client than were acknowledged      PrivacyError: the disk was rolled back; what a server says
                                       can refuse, and never lower what is charged
    two processes at once              a lock on the file; the second reads what the first wrote
    a charge of the earlier format     is of any units
    no ledger at all                   starts at zero where there is no policy; else PrivacyError,
                                       until the operator has begun one
"""

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedlora.errors import BudgetSpent, PrivacyError
from fedlora.lora.tree_file import sync_directory, write_atomically
from fedlora.privacy import units as sets
from fedlora.privacy.accounting import epsilon, in_words
from fedlora.privacy.charges import (
    Charge,
    Contents,
    dearest,
    digest,
    now,
    read_ledger,
    sealed,
)
from fedlora.privacy.ledger_before import Before
from fedlora.privacy.units import Units

NODE = "node"
"""The name of a node's ledger; a server's, of client-level privacy, is "clients"."""
RESTORE = (
    "restore it from a backup. Without it nobody knows what was spent, so nothing is trained; "
    "where there is none the node's operator says it: fedlora node recover node.toml --spent "
    "EPSILON"
)


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What the server has of this ledger: which it is, and how many charges of its run, and of
    this client, it knows."""

    ledger: int = 0
    charges: int = 0


@dataclass(frozen=True, slots=True)
class Receipt:
    """A charge is on disk."""

    epsilon: float
    """With it, of all that has a unit in common with it."""
    ledger: int
    """The ledger's own number, by chance; another one after a recovery."""
    charges: int
    """Of this run, and of this client where several share the ledger."""


class Ledger:
    """One ledger below a root directory."""

    def __init__(self, root: Path, name: str = NODE, opens: bool = True) -> None:
        """opens: may it begin by itself where there is none?"""
        self.root, self.opens = root, opens
        self.directory = root / "ledgers" / name
        self.path = self.directory / "charges.jsonl"
        self.marker = self.directory / "known.json"
        self.before = Before(root, name)

    @property
    def sets(self) -> Path:
        return self.directory / "units"

    def read(self, *more: Charge) -> Contents:
        """Every charge so far, those of the earlier format first; `more` is about to be made.

        Raises:
            PrivacyError: the ledger is gone, cut short or changed.
        """
        old = self.before.read(*more)
        if not self.directory.exists():
            return Contents(old)
        key, known = self._key(), self._known()
        if not self.path.exists():
            raise PrivacyError(f"the privacy ledger {self.path} is gone: {RESTORE}")
        found = read_ledger(self.path, key)
        n = known["records"]
        if len(found.heads) < n or found.heads[n - 1] != known["head"]:
            raise PrivacyError(
                f"the privacy ledger {self.path} is older than what was spent: it has "
                f"{len(found.heads)} records, and record {n} must have hash "
                f"{known['head'][:12]} ({self.marker}); restore the newest copy"
            )
        self.before.check(found.opening.get("before-it", {}))
        return replace(found, charges=(*old, *found.charges))

    def epsilon(self, delta: float) -> float:
        """The largest that any unit has spent."""
        found = self.read()
        paid = found.paid()
        kinds = {(c.units, c.reading): c for c in paid}
        each = (self.composed(found, paid, c, delta) for c in kinds.values())
        return max(each, default=found.lost)

    def composed(
        self, contents: Contents, paid: Sequence[Charge], last: Charge, delta: float
    ) -> float:
        """The epsilon of those of the charges that may have a unit in common with the last one."""
        met = (
            c.spend
            for c in paid
            if c.reading != last.reading or sets.meet(self.sets, c.units, last.units)
        )
        return contents.lost + epsilon(met, delta)

    def afford(self, charge: Charge, budget: float = 0.0) -> float:
        """The total epsilon with this charge; nothing is written.

        Raises:
            BudgetSpent: it would exceed the budget (0: none).
            PrivacyError: the ledger cannot be trusted.
        """
        return self._within(self.read(charge), charge, budget)

    def reserve(
        self,
        charge: Charge,
        budget: float = 0.0,
        units: Units | None = None,
        acknowledged: Acknowledged | None = None,
    ) -> Receipt:
        """Write the charge, which is on disk when this returns. `units`: whose rows; None: any.

        Raises:
            BudgetSpent: it would exceed the budget (0: none). No charge was written.
            PrivacyError: the ledger cannot be trusted.
        """
        with self.held():
            self._begun()
            contents = self.read(charge)
            paid = contents.count(charge.run, charge.client)
            self._check(acknowledged, contents, paid)
            if units:
                name = sets.save(self.sets, units.keyed(self._key()))
                charge = replace(charge, units=name, reading=units.reading)
            after = self._within(contents, charge, budget)
            if contents.torn:
                contents = self._heal(contents, charge)
            self._append(contents, charge.record())
        return Receipt(after, contents.opening["opened"], paid + 1)

    def begin(self) -> None:
        """Begin the ledger, at zero, where there is none: once in a node's life."""
        with self.held():
            if not self.directory.exists():
                self._make(0.0)

    def recover(self, spent: float) -> Path | None:
        """Charge an epsilon that the operator says was spent on records that are lost.

        A ledger that cannot be read is put aside, where is returned, and another begun.
        """
        with self.held():
            try:
                contents = self.read()
                if self.directory.exists():
                    said: dict[str, Any] = {
                        "opened": _drawn_number(),
                        "time": now(),
                        "recovered": spent,
                        "before-it": contents.opening.get("before-it", {}),
                    }
                    if contents.torn and contents.charges:
                        contents = self._heal(contents, contents.charges[-1])
                    elif contents.torn:
                        said["torn"] = digest(contents.torn)
                    self._append(contents, said)
                    return None
                aside = None
            except PrivacyError:
                aside = self.before.put_aside()
            self._make(spent, recovered=True)
        return aside

    # -- reading ----------------------------------------------------------------------------------

    def _within(self, contents: Contents, charge: Charge, budget: float) -> float:
        paid = contents.paid(charge)
        after = self.composed(contents, [*paid, charge], charge, charge.delta)
        if budget and after > budget * (1 + 1e-9):
            spent = self.composed(contents, paid, charge, charge.delta)
            raise BudgetSpent(
                f"the privacy budget is spent: epsilon is {in_words(spent)}, and "
                f"{charge.spend.steps} steps more make {in_words(after)}, above the limit of "
                f"{budget:g} at delta = {charge.delta:g} ({self.path}); nothing was trained"
            )
        return after

    def _check(self, acknowledged: Acknowledged | None, contents: Contents, paid: int) -> None:
        if not acknowledged or not acknowledged.charges:
            return
        here = contents.opening["opened"] == acknowledged.ledger
        if here and paid < acknowledged.charges:
            raise PrivacyError(
                f"the privacy ledger {self.path} is older than what the server knows of: it has "
                f"{paid} charges of this run, and {acknowledged.charges} were acknowledged; "
                "restore the newest copy"
            )
        if not here and "recovered" not in contents.opening:
            raise PrivacyError(
                f"the privacy ledger {self.path} is another than the one that this run began with; "
                + RESTORE
            )

    def _key(self) -> bytes:
        try:
            found = (self.directory / "key").read_bytes()
        except OSError as e:
            raise PrivacyError(f"{e.filename}, of the privacy ledger, is gone: {RESTORE}") from e
        if len(found) != 32:
            raise PrivacyError(f"{self.directory / 'key'} is damaged: {RESTORE}")
        return found

    def _known(self) -> dict[str, Any]:
        try:
            found = json.loads(self.marker.read_text())
            known = {"records": int(found["records"]), "head": str(found["head"])}
            whole = found["mac"] == digest(json.dumps(known), self._key())
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise PrivacyError(f"{self.marker} is gone or damaged ({e}): {RESTORE}") from e
        if not whole:
            raise PrivacyError(f"{self.marker} was changed: {RESTORE}")
        return known

    # -- writing ----------------------------------------------------------------------------------

    def _begun(self) -> None:
        if self.directory.exists():
            return
        if not self.opens and not self.before.files:
            raise PrivacyError.public(
                "this node has no privacy ledger, so nobody knows what was spent on its rows: its "
                "operator restores it, or types fedlora node recover node.toml --spent EPSILON (0 "
                "for a node that has never trained)"
            )
        self._make(0.0)

    def _make(self, spent: float, recovered: bool = False) -> None:
        """A ledger with its first record, all of it at once: no part of it is ever without the
        others."""
        new = self.directory.with_name(f".{self.directory.name}.{secrets.token_hex(8)}")
        new.mkdir(mode=0o700, parents=True)
        ledger = Ledger(self.root, new.name)
        (ledger.directory / "units").mkdir(mode=0o700)
        _write_key(new / "key")
        first: dict[str, Any] = {"opened": _drawn_number(), "time": now()}
        first |= {"recovered": spent} if recovered else {}
        first |= {"before-it": self.before.heads()}
        ledger._append(Contents(), first)
        os.rename(new, self.directory)
        sync_directory(self.directory.parent)

    def _heal(self, contents: Contents, charge: Charge) -> Contents:
        """Put the torn line on record, and charge for it."""
        found = dearest([*contents.charges[-1:], charge])
        self._append(contents, {**found.record(), "torn": digest(contents.torn)})
        return self.read()

    def _append(self, contents: Contents, record: dict[str, Any]) -> None:
        key, n = self._key(), len(contents.heads) + 1
        line, head = sealed({**record, "n": n, "before": contents.head}, key)
        new = not self.path.exists()
        with self.path.open("a+b") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
            ended = f.read(1) in (b"", b"\n")
            f.write((b"" if ended else b"\n") + line.encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        if new:
            sync_directory(self.path.parent)
        state = {"records": n, "head": head}
        state["mac"] = digest(json.dumps(state), key)
        write_atomically(self.marker, json.dumps(state).encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which nobody else writes to it."""
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.directory.with_suffix(".lock")):
            yield


def _drawn_number() -> int:
    """Of ten digits and 31 bits: a message that names it is as long whatever was drawn."""
    return 10**9 + secrets.randbelow(2**31 - 10**9)


def _write_key(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, secrets.token_bytes(32))
        os.fsync(file)
    finally:
        os.close(file)
