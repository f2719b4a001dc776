"""What a client keeps between rounds, in files of its own that outlive its process.

    <root>/client-<id>/round-00003.safetensors    what `upload` kept in round 3
    <root>/client-<id>/checked.json               what the training check has passed
    <root>/client-<id>/rows.txt                   a node's rows, by digest
    <root>/client-<id>/microbatch.txt             what it has halved train.microbatch to
    <root>/base/00002.safetensors                 base change 2, as the server sent it
    <root>/base/00000.safetensors                 what lora.init takes out of the base, if it does

Each file says whose it is, of which run and round: one that is whole and in another's place, as a
wrong backup would be, is no more this client's than one that is damaged.

The server says with each message which round's memory it builds on: the last round whose reply
it accepted. So a reply that was lost, or a server that went back to its last checkpoint, finds
the client as it was then. A client keeps that one and the newest.

What is gone or damaged below base/ the server sends again, once it is told so (LostBaseError). What
a client kept for itself nobody else has.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.errors import CheckpointError, ClientMemoryError, DataError, LostBaseError
from fedlora.lora.adapter import Delta, Factors
from fedlora.lora.tree_file import load, load_with_notes, save, write_atomically
from fedlora.strategies.base import Version

OF = "of"
"""The note of a file that says whose it is."""


class ClientMemory:
    def __init__(self, root: Path, client: int, token: str) -> None:
        """`token` names the run: the memory of another run is never mixed in."""
        self.root = root
        self.own = root / token / f"client-{client}"
        self.base = root / token / "base"
        self.client = client
        self.token = token

    def recall(self, round: int, keep: bool = False) -> Factors:
        """What was kept in that round; nothing for round 0. Of other rounds it is let go of, unless
        they are to be kept: a round that is not on record yet may have to be done again.

        Raises:
            ClientMemoryError: it is gone. Training on without it would silently be another method.
        """
        if round == 0:
            return Factors()
        path = self.own / f"round-{round:05}.safetensors"
        try:
            kept = self._load(path)
        except CheckpointError as e:
            raise ClientMemoryError(
                f"client {self.client} has lost its memory of round {round} ({e}); restore "
                f"{self.own}, or start the run anew"
            ) from e
        for other in self.own.glob("round-*.safetensors") if not keep else ():
            if other != path:
                other.unlink(missing_ok=True)
        return kept

    def remember(self, round: int, kept: Factors) -> None:
        self._save(self.own / f"round-{round:05}.safetensors", kept)

    def lost(self, round: int) -> Factors:
        """What the upload of that round lost to rounding; nothing where it kept none.

        Raises:
            CheckpointError: it is there, and damaged, or not for this fedlora to read.
        """
        path = self.own / f"lost-{round:05}.safetensors"
        for other in self.own.glob("lost-*.safetensors"):
            if other != path:
                other.unlink(missing_ok=True)
        if not path.exists():
            return Factors()
        return self._load(path)

    def lose(self, round: int, error: Factors) -> None:
        self._save(self.own / f"lost-{round:05}.safetensors", error)

    def _whose(self, path: Path) -> str:
        return f"{self.token}/client-{self.client}/{path.stem}"

    def _save(self, path: Path, tree: Factors) -> None:
        save(path, tree, {OF: self._whose(path)})

    def _load(self, path: Path) -> Factors:
        """
        Raises:
            CheckpointError: it is not there, is damaged, or of another client, run or round. A file
                that an older fedlora wrote does not say whose it is.
        """
        found: Factors
        found, notes = load_with_notes(path)
        if (whose := notes.get(OF, mine := self._whose(path))) != mine:
            raise CheckpointError(f"{path} is that of {whose}")
        return found

    def checked(self) -> list[str]:
        """What the training check has passed in this run; nothing where its record is damaged."""
        try:
            found = json.loads((self.own / "checked.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return []
        return [x for x in found if isinstance(x, str)] if isinstance(found, list) else []

    def add_checked(self, what: str) -> None:
        found = json.dumps([*self.checked(), what])
        write_atomically(self.own / "checked.json", found.encode())

    def microbatch(self) -> int:
        """What this client has halved train.microbatch to, for want of memory; 0: it has not.

        Raises:
            ClientMemoryError: that is on record, and damaged.
        """
        path = self.own / "microbatch.txt"
        text = path.read_bytes() if path.exists() else b"0"
        if not text.isdigit():
            raise ClientMemoryError(f"{path} is damaged: restore it, or start the run anew")
        return int(text)

    def halve(self, microbatch: int) -> None:
        write_atomically(self.own / "microbatch.txt", str(microbatch).encode())

    def check_rows(self, digest: str) -> None:
        """Nothing, where the client's rows are those of its first round, by their digest.

        Raises:
            DataError: they are others.
        """
        path = self.own / "rows.txt"
        if not path.exists():
            write_atomically(path, digest.encode())
        elif path.read_bytes() != digest.encode():
            raise DataError(
                f"client {self.client} began this run with other rows (data.node-path), by the "
                f"digest in {path}; put back the file that it began with, or begin a new run"
            )

    def add_base(self, versions: Sequence[Version]) -> None:
        """Store base changes; a snapshot makes all up to its number superfluous."""
        for v in versions:
            save(self.base / f"{v.number:05}.safetensors", v)

    def base_offset(self) -> Mapping[str, Delta]:
        """What the run's initialisation takes out of the base.

        Raises:
            LostBaseError: it is gone.
        """
        try:
            version = self._version(0)
        except CheckpointError as e:
            what = f"client {self.client} lacks what lora.init took out of the base"
            raise LostBaseError(f"{what} ({e}); the server has to send it again") from e
        return version.delta

    def base_to(self, number: int) -> list[Version]:
        """The changes that lead from W0 to that version, in order.

        Raises:
            LostBaseError: some are missing.
        """
        chain: list[Version] = []
        for n in range(number, 0, -1):
            try:
                version = self._version(n)
            except CheckpointError as e:
                what = f"client {self.client} lacks base change {n} of {number}"
                raise LostBaseError(f"{what} ({e}); the server has to send them again") from e
            chain.append(version)
            if version.snapshot:
                break
        return chain[::-1]

    def _version(self, n: int) -> Version:
        """
        Raises:
            CheckpointError: it is not there, is damaged, or another one.
        """
        path = self.base / f"{n:05}.safetensors"
        version: Version = load(path, Version)
        if version.number != n:
            raise CheckpointError(f"{path} holds base change {version.number}")
        return version
