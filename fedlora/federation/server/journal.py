"""The run's directory: config.toml, rounds.jsonl, clients.jsonl, checkpoint/, updates/.

A round is on record once its checkpoint is: the checkpoint carries the round's line, so a run
killed between the two finds the line there, and one killed before it repeats the round.
"""

import json
import math
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config.older import kept, missing, of_strategy
from fedlora.config.reader import NOT_THE_EXPERIMENT, Config
from fedlora.errors import CheckpointError, FormatError, StrategyError
from fedlora.federation.server import ends
from fedlora.federation.server.places import check_own, check_place
from fedlora.lora import tree_file
from fedlora.lora.adapter import Delta
from fedlora.lora.tree_format import Names
from fedlora.reports.line_digest import seal
from fedlora.reports.record_types import RoundRecord, checked
from fedlora.reports.run_files import records
from fedlora.strategies.base import Client, Layer, Strategy, Upload, Version
from fedlora.strategies.base_log import BaseLog
from fedlora.strategies.registry import states_of
from fedlora.strategies.server_optimizers import Moments
from fedlora.strategies.without_factors import WithoutFactors
from fedlora.training import user_code

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Member:
    """What the server remembers of one client over the run."""

    id: int
    rank: int
    memory_round: int = 0
    """The last round whose reply was accepted: the memory the client is to build on."""
    last_round: int = 0
    """The last round whose reply was accepted, whether or not the client keeps memory."""
    base_version: int = 0
    rounds: int = 0
    failures: int = 0
    offences: int = 0
    """Bad updates since the last good one; what only fails or is late is none."""
    bytes_down: int = 0
    bytes_up: int = 0
    examples: int = 0
    first: Mapping[str, float] = field(default_factory=dict)
    personal: Mapping[str, float] = field(default_factory=dict)
    final: Mapping[str, float] = field(default_factory=dict)
    plan: Mapping[str, int] = field(default_factory=dict)
    """Module to rank, where its modules differ or are not all; else `rank` in each."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """What its rounds take: see `ranks.Timing`."""
    cap: int = 0
    """The most layers its memory allows; 0: all."""
    personalized: Mapping[str, float] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)
    microbatch: int = 0
    """What it has halved train.microbatch to, for want of memory; 0: it has not."""
    ledger: int = 0
    """The number of its privacy ledger."""
    charges: int = 0
    """Of this run, as its last accepted reply says: told back to it with every message."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: all that the next round depends on."""

    token: str
    state: Any
    members: Mapping[int, Member]
    baselines: Mapping[str, Mapping[str, float]]
    seconds: float
    clock: float = 0.0
    """Virtual seconds so far, where there is a device model."""
    moments: Any = None
    """The server optimiser's."""
    clip: float = 0.0
    """Client-level DP's clip norm, where it adapts."""
    base_offset: Mapping[str, Delta] = field(default_factory=dict)
    """What lora.init took out of the base."""
    buffer: Mapping[str, Any] = field(default_factory=dict)
    """Who was training, and on which round's state, where there is a buffer."""
    best: Mapping[str, float] = field(default_factory=dict)
    """The best round by validation rows, and its score: choice.py."""


OLDER = {
    1: Names(
        fields={"Saved.origin": "base_offset"},
        dropped=frozenset({"Saved.finished"}),  # never read
    )
}
"""What checkpoints of older formats call a Saved and a Member: see lora/tree_format.py."""


def state_types(strategy: Strategy[Any]) -> list[type]:
    """The types a strategy's state may be made of: the base log's, those its own file knows, and
    those it was registered with."""
    strategy = strategy.inner if isinstance(strategy, WithoutFactors) else strategy
    known = vars(sys.modules[type(strategy).__module__]).values()
    named = [t for t in known if isinstance(t, type)]
    return [Version, BaseLog, Client, Layer, Moments, *named, *states_of(strategy)]


def check_kept(strategy: Strategy[Any], state: Any) -> None:
    """Check that a checkpoint of the state could be read again.

    Raises:
        StrategyError: it holds a dataclass that nobody could find again; says how to name it.
    """
    named = {t.__name__ for t in (*tree_file.KNOWN, *state_types(strategy))}
    if lost := sorted(tree_file.kinds(state) - named):
        cls = type(strategy)
        raise StrategyError(
            f"the state of {cls.__name__} holds a {lost[0]}, which no checkpoint could give back: "
            f"import {lost[0]} by name in {cls.__module__}, or register it with "
            f"register_strategy(..., states=({lost[0]},))"
        )


class Journal:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.directory = Path(config.run.out, config.run.name)
        self.rounds = self.directory / "rounds.jsonl"

    def check(self) -> None:
        """Check that the run can begin or, with run.resume, be resumed. Writes nothing.

        Raises:
            CheckpointError: as `open`, or as `resume`.
        """
        if self.config.run.resume:
            self._check_same()
        else:
            self._check_free()

    def _check_free(self) -> None:
        check_place("run.out", self.directory)
        if self.rounds.exists():
            name = shlex.quote(str(self.directory))
            raise CheckpointError(
                f"{self.directory} holds a run already: continue it with "
                f"`fedlora simulate --resume {name}`, or give this one another run.name"
            )

    def open(self) -> None:
        """Start the run's directory afresh; CheckpointError where a run of this name is there."""
        self._check_free()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.keep_config()
        self.rounds.touch()

    def resume(self, *types: type) -> tuple[int, Any]:
        """The last round whose checkpoint is whole, and what was saved; (-1, None) before any.

        Raises:
            FormatError: the checkpoint is whole, and not for this fedlora to read.
            CheckpointError: the configuration has changed; says in which keys. Or the run had
                checkpoints, and they are gone.
        """
        self._check_same()
        for left in [*self.directory.rglob(".*.tmp")]:  # of a write that was cut short
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        if (found := self.last(*types)) is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.rounds.write_text("")
            self.keep_config()
            return -1, None
        tree, notes = found
        with _damage(self.directory / "checkpoint"):
            line, number = json.loads(notes["line"]), int(notes["round"])
        recorded = max((x["round"] for x in self.lines()), default=0)
        if recorded > number and not self.damaged:
            gone = f"round {recorded} is on record, and its checkpoint is gone"
            self.damaged.append(CheckpointError(f"{gone} from {self.directory / 'checkpoint'}"))
        self._rewrite(checked(RoundRecord, line, f"{self.directory / 'checkpoint'}, its line"))
        self.keep_config()
        ends.put_away(self.directory, self.config.run.rounds)
        return number, tree

    def begun_config(self) -> dict[str, Any]:
        """The config in the newest checkpoint, flat; of a run that has none, nothing."""
        return begun[0] if (begun := self._begun_with()) else {}

    def kept(self) -> list[str]:
        """A line for each older rule that this run keeps: config/older.py."""
        begun = self._begun_with()
        name = self.config.strategy.name
        return [*kept(begun[0], Config().flat(), name)] if begun else []

    def last(self, *types: type) -> tuple[Any, dict[str, str]] | None:
        """The newest whole checkpoint, one of the first type, and its notes; None: there is none.

        `damaged` is then why newer ones were passed over.

        Raises:
            FormatError: the newest one is whole, and not for this fedlora to read.
            CheckpointError: there are some, and none can be read. Never a fresh start instead.
        """
        self.damaged: list[CheckpointError] = []
        for path in self._checkpoints()[::-1]:
            try:
                tree, notes = tree_file.load_with_notes(path, *types, older=OLDER)
                if not isinstance(tree, types[0]):
                    raise CheckpointError(f"{path} is damaged: it holds no state of a run")
                check_own(path, notes)
                return tree, notes
            except FormatError:  # the one before it would undo a round that is whole
                raise
            except CheckpointError as e:  # damaged: the one before it is whole
                self.damaged.append(e)
        if self.damaged:
            raise self.damaged[0]
        return None

    def commit(self, round: int, tree: Any, record: Mapping[str, Any], keep: int = -1) -> None:
        """Save the state after a round, then put the round on record. `keep` stays as well.

        Raises:
            CheckpointError: the disk is full, say. The round before it is whole.
        """
        line = json.dumps(_plain(record))
        notes = {
            "round": str(round),
            "config": json.dumps(self.config.flat()),
            "line": line,
        }
        if code := user_code.sources(self.config):
            notes["code"] = json.dumps(dict(code))
        path = self.directory / "checkpoint" / f"round-{round:05}.safetensors"
        try:
            tree_file.save(path, tree, notes)
            with self.rounds.open("a") as f:
                f.write(seal(line) + "\n")
        except OSError as e:
            raise CheckpointError(
                f"round {round} could not be saved in {self.directory}: {e.strerror}. The "
                "checkpoint before it is whole: if the disk is full, free some, then resume."
            ) from e
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            if old.stem != f"round-{keep:05}":
                old.unlink()

    def keep_begun_with(self, digests: Mapping[str, str]) -> None:
        """Put on record what the run began with: training/begun_with.py."""
        text = json.dumps(dict(digests), indent=1) + "\n"
        tree_file.write_atomically(self.directory / "begun_with.json", text.encode())

    def begun_with(self) -> dict[str, str]:
        """What the run began with; nothing of a run that is older than this record.

        Raises:
            CheckpointError: the record is damaged.
        """
        path = self.directory / "begun_with.json"
        try:
            found: Any = json.loads(path.read_text("utf-8")) if path.exists() else {}
        except ValueError:  # not JSON, or not UTF-8
            found = None
        if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
            raise CheckpointError(f"{path}: damaged; it is no record of what the run began with")
        return found

    def lines(self) -> list[dict[str, Any]]:
        """The rounds on record, in order."""
        return [*records(RoundRecord, self.rounds)]

    def update(self, round: int, upload: Upload) -> None:
        """Keep one accepted update as the client sent it."""
        path = self.directory / "updates" / f"round-{round:03}" / f"client-{upload.client.id}"
        save_update(path.with_suffix(".safetensors"), upload)

    def clients(self, records: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(_plain(r)) + "\n" for r in records)
        tree_file.write_atomically(self.directory / "clients.jsonl", text.encode())

    def summary(self, record: Mapping[str, Any], name: str = "summary") -> None:
        text = json.dumps(_plain(record), indent=None if name != "summary" else 2)
        tree_file.write_atomically(self.directory / f"{name}.json", text.encode())

    def keep_config(self) -> None:
        """Put the config beside the run: as it begins or goes on, and once clients decided some."""
        text = self.config.toml()
        tree_file.write_atomically(self.directory / "config.toml", text.encode())

    def _checkpoints(self) -> list[Path]:
        return sorted((self.directory / "checkpoint").glob("round-*.safetensors"))

    def _begun_with(self) -> tuple[dict[str, Any], dict[str, str]] | None:
        """The config, and the digests of the user's code, in the newest checkpoint that is read.

        Raises:
            FormatError: a newer fedlora wrote the newest.
        """
        for path in self._checkpoints()[::-1]:
            try:
                notes = tree_file.notes(path)
                with _damage(path):
                    was, code = json.loads(notes["config"]), json.loads(notes.get("code", "{}"))
                    return dict(was), dict(code)
            except FormatError:
                raise
            except CheckpointError:
                continue
        return None

    def _check_there(self) -> None:
        if self._checkpoints() or not self.rounds.exists():
            return
        if n := self.rounds.read_bytes().count(b"\n"):
            raise CheckpointError(
                f"{self.directory / 'checkpoint'} is empty, and {n} rounds are on record in "
                f"{self.rounds}: restore the newest checkpoint, or give a new run another run.name"
            )

    def _check_same(self) -> None:
        self._check_there()
        if (begun := self._begun_with()) is None:
            return
        begun_with, code = begun
        was = {**Config().flat(), **missing(begun_with), **begun_with}
        now = ends.before_extension(was, self.config.flat())
        mine = ("", self.config.strategy.name)  # another strategy's options change nothing
        changed = [
            f"{key}: was {was.get(key)!r:.200}, is {now.get(key)!r:.200}"
            for key in {**was, **now}
            if was.get(key) != now.get(key)
            and not key.startswith(NOT_THE_EXPERIMENT)
            and of_strategy(key) in mine
        ]
        if ends.more_rounds_change_nothing(self.config):
            changed = [c for c in changed if not c.startswith("run.rounds:")]
        for key, digest in user_code.sources(self.config).items() if not changed else ():
            if digest != code.get(key):
                changed.append(f"{key}: the source of {now[key]} was {code.get(key)}, is {digest}")
        if changed:
            raise CheckpointError(
                f"{self.directory} was begun with another configuration:\n  "
                + "\n  ".join(changed)
                + "\nResume with the one it was begun with, or give the new run another run.name."
            )

    def _rewrite(self, last: dict[str, Any]) -> None:
        """Leave exactly the lines up to the checkpoint's round, its own line last."""
        lines = [x for x in records(RoundRecord, self.rounds) if x["round"] < last["round"]]
        whole = "".join(seal(json.dumps(line)) + "\n" for line in [*lines, last])
        tree_file.write_atomically(self.rounds, whole.encode())


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What a checkpoint's notes lack, or hold in another form, as a CheckpointError."""
    try:
        yield
    except (KeyError, ValueError, TypeError) as e:
        raise CheckpointError(f"{path} is damaged: its notes are no run's: {e}") from e


def save_update(path: Path, upload: Upload) -> None:
    """A client's factors by module path; scales and number of examples in the metadata."""
    tensors = {
        (name if column == "other" else f"{name}.{column}"): x
        for column, name, x in upload.sent.items()
    }
    metadata = {
        "client": str(upload.client.id),
        "num_examples": str(upload.num_examples),
        "scale": json.dumps(dict(upload.sent.scale)),
    }
    tree_file.write_tensors(path, tensors, metadata)


def _plain(x: Any) -> Any:
    """JSON without NaN: a number that is none is null."""
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, Mapping):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple | set | frozenset):
        return [_plain(value) for value in x]
    return x
