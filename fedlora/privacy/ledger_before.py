"""Ledgers of the earlier format, a file for each fingerprint of rows: read, charged, not written.

    <root>/ledgers/<data>.jsonl      a hash chain without a key
    <root>/known/<data>.json         that the file exists, its length and its head

Whose rows a fingerprint was of cannot be told, so such a charge is of any units.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.errors import PrivacyError
from fedlora.privacy.charges import Charge, Contents, read_ledger

SERVERS = "clients"
"""The one file that is a server's, of clients; all others are of rows."""


class Before:
    """The files of the earlier format beside a ledger of this name."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name

    @property
    def files(self) -> list[Path]:
        """Each that is there, or must be."""
        there = {p.stem for p in (self.root / "ledgers").glob("*.jsonl")}
        there |= {p.stem for p in (self.root / "known").glob("*.json")}
        mine = [x for x in there if (x == SERVERS) == (self.name == SERVERS)]
        return [self.root / "ledgers" / f"{x}.jsonl" for x in sorted(mine)]

    def read(self, *more: Charge) -> tuple[Charge, ...]:
        """Their charges; a torn last line is the dearer of the one before and of `more`.

        Raises:
            PrivacyError: one is gone, cut short or changed.
        """
        return tuple(c for path in self.files for c in _read(self.root, path).paid(*more))

    def heads(self) -> dict[str, list[Any]]:
        """By file: how long it is, and its head."""
        found = {path.stem: _read(self.root, path) for path in self.files}
        return {stem: [len(x.heads), x.head] for stem, x in found.items()}

    def check(self, known: Mapping[str, Sequence[Any]]) -> None:
        """Nothing, where each file still begins as it was when the ledger with a key began.

        Raises:
            PrivacyError: one does not.
        """
        for stem, (records, head) in known.items():
            path = self.root / "ledgers" / f"{stem}.jsonl"
            found = _read(self.root, path) if path.exists() else Contents()
            if records and (len(found.heads) < records or found.heads[records - 1] != head):
                raise PrivacyError(
                    f"the privacy ledger {path}, of an earlier fedlora, is gone or no longer what "
                    "it was; restore it from a backup"
                )

    def put_aside(self) -> Path:
        """Where all ledgers of this root are now."""
        n = 1
        while (aside := self.root / f"ledgers.lost-{n}").exists():
            n += 1
        for name in ("ledgers", "known"):
            if (self.root / name).exists():
                (self.root / name).rename(self.root / f"{name}.lost-{n}")
        return aside


def _read(root: Path, path: Path) -> Contents:
    marker = root / "known" / f"{path.stem}.json"
    try:
        found = json.loads(marker.read_text())
        known = (int(found["records"]), str(found["head"]))
    except FileNotFoundError:
        known = (0, "")
    except (ValueError, TypeError, KeyError) as e:
        raise PrivacyError(f"{marker} is damaged ({e}); restore it and the ledger") from e
    if not path.exists():
        raise PrivacyError(
            f"the privacy ledger {path} is gone, but its rows were trained on before ({known[0]} "
            f"charges, says {marker}); restore it from a backup. Without it nobody knows what was "
            "spent, so nothing is trained"
        )
    contents = read_ledger(path)
    if known[0] and (len(contents.heads) < known[0] or contents.heads[known[0] - 1] != known[1]):
        raise PrivacyError(
            f"the privacy ledger {path} is older than what was spent: it has "
            f"{len(contents.heads)} records, and record {known[0]} must have hash {known[1][:12]} "
            f"({marker}); restore the newest copy"
        )
    return contents
