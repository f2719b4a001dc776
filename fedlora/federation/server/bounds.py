"""What no honest client can send, by the length of its change; and a state that is no number.

    norm bound    a change above round.norm-bound times the round's median does not count
    count bound   examples above round.count-bound times the round's median count as so many
    sum bound     of a secure aggregation, where no single client can be judged
    finite        a state that holds NaN or Inf is never committed

The length of an adapter's change is that of s_i B_i A_i less what the client began with, over all
modules: how it is factored does not matter to it. Where a client keeps a factor to itself, or the
form has no A and B, it is the length of what its tensors changed by. A head and whatever else
trains beside is held against the others' heads. The tensors of the adapter as they are sent are
held against the others' as well, since most strategies average A and B apart: k A and B / k are no
change at all, and k = 1000 would have the mean of the A.

The median is over all of the round's updates, and needs three: of two, nobody can say which is
the odd one. Two or one, and a sum, are held against MOST times the norm of the weights that they
change instead, and their counts against round.max-examples alone. Where the median is 0 most
adapters did not move, as A does not while B is 0: then what the tensors themselves changed by is
held against the norm of those that were sent.
"""

import math
import statistics
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.config.sections import RoundConfig
from fedlora.errors import NotFiniteError, RoundError
from fedlora.federation.server.exchange import Received
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import Session, Setting
from fedlora.federation.server.screening import began
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.lora.adapter import COLUMNS, Factors
from fedlora.strategies import robust
from fedlora.strategies.base import Client, Round, Upload

MOST = 100.0
"""A change is never longer than so many times the weights that it changes."""
MAJORITY = 3
"""Updates from which on the median says what is usual."""
IN_MEMORY = 64 * 2**20
"""Bytes of the updates that wait in memory until the median is known; the rest wait on the disk."""
WHAT = {"adapter": "adapter", "tensors": "adapter's factors", "other": "other tensors"}

Lengths = Mapping[str, float]
"""By "adapter" and "other": how long a client's change is. "tensors" and "sent", of the adapter's
tensors as they travel: their change, and their norm before it."""


class ClientBounds:
    """The `Stage` that leaves out whose change is too long, and caps counts.

    It waits for all of the round's updates: each is held against their median.
    """

    def __init__(self, setting: Setting, session: Session, times: float) -> None:
        """times: round.norm-bound, or what stands in for it."""
        self.setting, self.session, self.times = setting, session, times
        self.found: dict[str, Any] = {}
        self._weight = cache(lambda: weight(setting))

    @staticmethod
    def applies(setting: Setting, session: Session) -> bool:
        """Are there single updates, with lengths and counts that nothing else bounds?

        Client-level privacy clips each update itself, and counts each once.
        """
        return not setting.config.secure.aggregation and session.central is None

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        self.found = {}

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        """Those that count, once all are here, as they count."""
        found: dict[int, Lengths] = {}
        counts: dict[int, int] = {}
        room = WaitingRoom(self.setting.journal.directory)
        for upload in uploads:
            if self.times:
                found[upload.client.id] = lengths(self.setting, run.state, upload, round)
            counts[upload.client.id] = upload.num_examples
            room.take(upload)
            del upload
        refused = self._too_long(found)
        if refused:
            self.found = {"refused": sorted(refused), "norms": found}
        for i, reason in refused.items():
            received.take_back(i, round, Refusal(FailureKind.OUT_OF_BOUNDS, reason))
            del counts[i]
        capped = self._capped(counts, round, received)
        return (
            replace(u, num_examples=capped.get(u.client.id, u.num_examples))
            for u in room.leave()
            if u.client.id not in refused
        )

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        return after

    def record(self) -> Mapping[str, Any]:
        """Of a round in which a bound acted: on whom, and all lengths."""
        return {"bounds": self.found} if self.found else {}

    def _too_long(self, found: Mapping[int, Lengths]) -> dict[int, str]:
        few = len(found) < MAJORITY and plain(self.setting)
        longest = MOST * self._weight() if few and found else math.inf
        return too_long(found, self.times, longest)

    def _capped(
        self, counts: Mapping[int, int], round: Round, received: Received
    ) -> Mapping[int, int]:
        """The counts that are too large, as they count. Said to all: (E) has other weights."""
        config = self.setting.config
        if config.robust.method != "none":  # under which all weigh the same
            return {}
        found = capped(counts, config.round.count_bound)
        for i, n in sorted(found.items()):
            received.clients[i]["counted"] = n
            self.session.observer.note(
                f"round {round.number}: client {i} claims {counts[i]} examples and counts as {n}, "
                f"round.count-bound = {config.round.count_bound:g} times the round's median: (E) "
                "holds for the weights that count"
            )
        if found:
            as_claimed = {i: {"examples": counts[i], "counted": n} for i, n in found.items()}
            self.found = {**self.found, "capped": as_claimed}
        return found


def capped(counts: Mapping[int, int], times: float) -> dict[int, int]:
    """By client whose count is above so many times their median: what it counts as."""
    if not times or len(counts) < MAJORITY:
        return {}
    most = times * statistics.median(counts.values())
    return {i: max(1, int(most)) for i, n in counts.items() if n > most}


def too_long(
    found: Mapping[int, Lengths], times: float, longest: float = math.inf
) -> dict[int, str]:
    """By client, why its update does not count.

    longest: what the change of an adapter is held against where there are too few for a median.
    """
    refused: dict[int, str] = {}
    for what, said in WHAT.items():
        mine = {i: x[what] for i, x in found.items() if what in x}
        most, of = longest, f"{MOST:g} times the norm of the weights"
        if len(mine) >= MAJORITY:
            most = times * statistics.median(mine.values())
            of = f"round.norm-bound = {times:g} times the round's median"
            if not most and what == "adapter" and all("sent" in x for x in found.values()):
                mine = {i: x["tensors"] for i, x in found.items()}
                most = times * statistics.median(x["sent"] for x in found.values())
                of = f"round.norm-bound = {times:g} times that of what the clients were sent"
        elif what != "adapter":
            continue
        for i, length in mine.items():
            if most and not length <= most:
                refused[i] = (
                    f"the change of its {said} has norm {length:.3g}, above {most:.3g}, {of}: the "
                    "mean is over the others"
                )
    return refused


def within(setting: Setting, session: Session, uploads: Sequence[Upload]) -> list[Upload]:
    """What clients send once, beside the rounds: those within the bounds, as they count.

    The length is that of all that was sent.
    """
    config, tell = setting.config.round, session.observer
    sizes = {u.client.id: moved(u.sent, Factors()) for u in uploads}
    refused = too_long(sizes, config.norm_bound)
    for i, reason in refused.items():
        tell.client_failed(i, reason)
    left = [u for u in uploads if u.client.id not in refused]
    counts = {u.client.id: u.num_examples for u in left}
    found = capped(counts, config.count_bound)
    for i, n in sorted(found.items()):
        tell.note(f"client {i} claims {counts[i]} examples and counts as {n}: round.count-bound")
    return [replace(u, num_examples=found.get(u.client.id, u.num_examples)) for u in left]


class SumBound:
    """The `Stage` that checks a sum, of which no part can be: its weight, its values, its norm."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._weight = cache(lambda: weight(setting))

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        pass

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        """The uploads that stand for the sum.

        Raises:
            RoundError: no clients that keep to the terms can have this sum. Nothing is committed.
        """
        sums, n = list(uploads), len(received.accepted)
        longest = MOST * self._weight() if plain(self.setting) else math.inf
        if why := implausible(self.setting, run.state, sums, round, n, longest):
            raise RoundError(
                f"round {round.number}: the sum of {n} clients {why}. Who of "
                "them it is cannot be told: secure aggregation shows the sum alone. Nothing of "
                f"this round was committed; the state before it is in {kept(self.setting)}"
            )
        yield from sums

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        return after

    def record(self) -> Mapping[str, Any]:
        return {}


def implausible(
    setting: Setting,
    state: Any,
    sums: Sequence[Upload],
    round: Round,
    clients: int,
    longest: float,
) -> str:
    """Why honest clients cannot have this sum; empty where they can.

    clients: how many it is over; a private one counts as one example. longest: of a change.
    """
    terms, weight_ = setting.config.secure, sum(u.num_examples for u in sums)
    most = clients * (1 if setting.config.privacy.on else terms.max_weight)
    if not clients <= weight_ <= most:
        return f"has weight {weight_}: must be {clients} to {most}, by secure.max-weight"
    for u in sums:
        for column, name, x in u.sent.items():
            scale = u.sent.scale.get(name, 1.0) if column in ("B", "R") else 1.0
            if not float(x.abs().max() if x.numel() else 0.0) * scale <= 2 * terms.clipping_range:
                return f"has values in {column} of {name} beyond secure.clipping-range"
        length = lengths(setting, state, u, round)["adapter"]
        if not length <= longest:
            return f"is a change of norm {length:.3g}, above {MOST:g} times that of the weights"
    return ""


def check_finite(setting: Setting, run: Saved, round: Round) -> None:
    """Nothing, where every number of the model that is to be committed is finite.

    Raises:
        NotFiniteError: one is not.
    """
    effective = setting.strategy.effective(run.state)
    model = (effective.factors, [v.delta for v in effective.base[-1:]])
    for what, tree in (("model", model), ("server.optimizer's moments", run.moments)):
        for x in tensors(tree):
            if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                raise NotFiniteError(
                    f"round {round.number}: the new {what} holds NaN or Inf, though every "
                    "update that counts is finite. Nothing of this round was committed; the state "
                    f"before it is in {kept(setting)}. Lower server.lr or train.lr, or set "
                    "round.norm-bound, and resume"
                )


def stricter(setting: Setting, session: Session) -> float:
    """The norm bound under which a round goes again whose new state is not finite; 0: it does not.

    It is the default one, where the run has a wider one or none. Where it held, no client stands
    out; of a sum, or where each update is clipped, nobody could be named.
    """
    mine, usual = setting.config.round.norm_bound, RoundConfig().norm_bound
    wider = not mine or mine > usual
    return usual if wider and ClientBounds.applies(setting, session) else 0.0


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a state, wherever they lie in it."""
    if isinstance(tree, Tensor):
        yield tree
    elif is_dataclass(tree) and not isinstance(tree, type):
        for f in fields(tree):
            yield from tensors(getattr(tree, f.name))
    elif isinstance(tree, Mapping):
        for x in tree.values():
            yield from tensors(x)
    elif isinstance(tree, tuple | list):
        for x in tree:
            yield from tensors(x)


def plain(setting: Setting) -> bool:
    """Is a client's whole change s B A, and known to the server?"""
    return setting.model.form.kind == "factors" and setting.guarantee != "shared"


def lengths(setting: Setting, state: Any, upload: Upload, round: Round) -> Lengths:
    """How long an update's change is, of the adapter and of what else trained."""
    strategy = setting.strategy
    start = began(strategy, state, upload, round)
    found = {**moved(upload.sent, start.sent)}
    found["tensors"] = found["adapter"]
    found["sent"] = _norm_of(start.sent, Factors(), COLUMNS[:3])
    if plain(setting):
        last, first = strategy.trained(state, upload, round), strategy.trained(state, start, round)
        parts = (
            robust.norms([robust.change({m: x}, {m: first[m]} if m in first else {})])
            for m, x in last.items()
        )
        found["adapter"] = math.hypot(*(float(x) for x in parts))
    return found


def moved(end: Factors, start: Factors) -> Lengths:
    """The Frobenius norms of end - start, of the factors as they are and of the other tensors."""
    found = {"adapter": _norm_of(end, start, COLUMNS[:3])}
    return {**found, "other": _norm_of(end, start, COLUMNS[3:])} if end.other else found


def _norm_of(end: Factors, start: Factors, columns: Sequence[str]) -> float:
    parts = []
    for c in columns:
        before = getattr(start, c)
        for name, x in getattr(end, c).items():
            change = x.double() - before[name].double() if name in before else x.double()
            parts.append(float(change.norm()))
    return math.hypot(*parts)


def weight(setting: Setting) -> float:
    """The Frobenius norm of the adapted modules' W0."""
    held = setting.model.weights()
    return math.hypot(*(float(held[m].detach().double().norm()) for m in setting.model.shapes))


def kept(setting: Setting) -> Path:
    return setting.journal.directory / "checkpoint"


class WaitingRoom:
    """Uploads in their order: the first in memory, and beyond IN_MEMORY bytes in files."""

    def __init__(self, run: Path) -> None:
        """`run`: the directory that the files' own is made in, where there are any."""
        self._run = run
        self._left = IN_MEMORY
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._held: deque[tuple[Upload, Path | None]] = deque()
        self._order: dict[Path, list[str]] = {}

    def take(self, upload: Upload) -> None:
        self._left -= sum(x.numel() * x.element_size() for _, _, x in upload.sent.items())
        if self._left >= 0:
            self._held.append((upload, None))
            return
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(
                ".tmp", ".updates.", self._run, ignore_cleanup_errors=True
            )
        path = Path(self._files.name, f"client-{upload.client.id}.safetensors")
        found = {f"{c}/{name}": x.contiguous() for c, name, x in upload.sent.items()}
        save_file(found, path)
        self._order[path] = [*found]
        self._held.append((replace(upload, sent=Factors(upload.sent.scale)), path))

    def leave(self) -> Iterator[Upload]:
        """Each once, and then it is no longer held; no file is left."""
        while self._held:
            upload, path = self._held.popleft()
            if path is not None:
                columns: dict[str, dict[str, Tensor]] = {c: {} for c in COLUMNS}
                found = load_file(path)
                for key in self._order.pop(path):
                    column, _, name = key.partition("/")
                    columns[column][name] = found.pop(key)
                upload = replace(upload, sent=Factors(upload.sent.scale, **columns))
            yield upload
            del upload
        if self._files is not None:
            self._files.cleanup()
