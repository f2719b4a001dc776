"""The server's four stages of secure aggregation, after which it has the sum and nothing else.

    kinds     the cohort by ranks; the only client of its ranks is left out
    setup     U0: public keys
    share     U1: encrypted shares, each forwarded to whom it is for
    collect   U2: the masked vectors of those that trained, summed as they come
    unmask    U3: shares, of the own seed of each of U2 and of the key of each of U1 that is not

The sum leaves as one upload a kind (see `vector`), so the strategies stay unaware. A client that
is lost at any stage costs its own update, as long as `threshold` of every client's neighbours are
left; else the round ends with a RoundError, with nothing learned and the checkpoint intact. Where
all that were lost say that their budget is spent, it is BudgetSpent.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import FedLoraError, PrivacyError, RoundError, StrategyError, UpdateError
from fedlora.federation.secure import masking
from fedlora.federation.secure.agreement import table_of
from fedlora.federation.secure.masking import Words
from fedlora.federation.secure.rules import TOGETHER, unsummable
from fedlora.federation.secure.terms import SMALLEST, Terms, neighbours
from fedlora.federation.secure.vector import Kind, decode, kinds_of
from fedlora.federation.server.exchange import Received, exchange, facts_of, tag_of
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import (
    Session,
    Setting,
    base_number,
    cuts,
    message,
    told,
    too_few,
)
from fedlora.federation.wire.certificate import (
    WITHIN,
    masked_shapes,
    without_changes,
    without_masked,
)
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.federation.wire.messages import Shapes, arrays_of, configs_of, count_bytes
from fedlora.strategies.base import Client, Round, Upload
from fedlora.training.certificate import names_of, public_scales

T = TypeVar("T")
LONGEST = 4096
"""Bytes of a key or a share: theirs have some hundreds."""


def uploads(
    setting: Setting,
    session: Session,
    run: Saved,
    grid: Grid,
    cohort: Sequence[Client],
    round: Round,
    received: Received,
) -> Iterator[Upload]:
    """The uploads that stand for the sum of what the cohort sends.

    Raises:
        StrategyError: the strategy needs more than sums; before anything is sent.
        RoundError, BudgetSpent: too few clients are left.
    """
    yield from SecureRound(setting, session, run, grid, cohort, round, received).sum()


class SecureRound:
    def __init__(
        self,
        setting: Setting,
        session: Session,
        run: Saved,
        grid: Grid,
        cohort: Sequence[Client],
        round: Round,
        received: Received,
    ) -> None:
        self.setting, self.session, self.run = setting, session, run
        self.grid, self.round, self.received = grid, round, received
        self.kinds = self._kinds(cohort)
        self.kind_of = {c.id: n for n, kind in enumerate(self.kinds) for c in kind.clients}
        self.client = {c.id: c for kind in self.kinds for c in kind.clients}
        self.ids = sorted(self.client)
        if len(self.ids) < SMALLEST:
            raise self._too_few(
                f"{len(self.ids)} clients are not alone of their ranks, and it takes {SMALLEST}"
            )
        self.terms = Terms.of(setting.config, len(self.ids))
        self.near = neighbours(self.ids, self.terms.shares, round)
        trains = [self._trains(kind.clients[0]) for kind in self.kinds]
        self.table = table_of([kind.shapes for kind in self.kinds], trains, self.kind_of)
        self.layout = self.table.layout
        self.told = self.table.digest(self.terms, round.number, session.incarnation)
        self._check()
        names = {n.removeprefix(WITHIN) for _, n in self.layout.shapes if n.startswith(WITHIN)}
        self.scales = public_scales(setting.model, sorted(names))
        self.totals: dict[int, Words] = {}
        self.keeps: dict[int, bool] = {}
        self.up: dict[int, int] = {}

    def sum(self) -> list[Upload]:
        """All four stages."""
        keys = self._setup()
        boxes = self._share(keys)
        shared = set(boxes)
        summed = self._collect(boxes)
        total = self._unmask(keys, shared, summed)
        try:
            found, loss, error = decode(total, len(summed), self.layout, self.kinds, self.terms)
        except UpdateError as e:
            raise self._failed(str(e)) from None
        found, change = without_changes(found, self.scales)
        self.received.summed = change, error, self.scales
        self.received.loss = None if self.setting.config.privacy.on else loss
        self.received.secure = {
            "asked": len(self.ids),
            "summed": len(summed),
            "shares": self.terms.shares,
            "threshold": self.terms.threshold,
            "error": error,
        }
        for i in sorted(summed):
            self._accept(i)
        return found

    def _check(self) -> None:
        """Does the strategy go on sums? Measured once for each set of tensors that it asks for."""
        asked = tuple(tuple(sorted(kind.shapes.items())) for kind in self.kinds)
        if asked in self.session.summable:
            return
        kinds = [replace(kind, shapes=without_masked(kind.shapes)) for kind in self.kinds]
        if reason := unsummable(self.setting.strategy, self.run.state, kinds, self.round):
            raise StrategyError(reason)
        self.session.summable.add(asked)

    # -- the stages ---------------------------------------------------------------------------

    def _setup(self) -> dict[int, list[bytes]]:
        asked = {i: ConfigRecord({"cohort": self.terms.cohort}) for i in self.ids}

        seen: set[bytes] = set()

        def read(_: int, content: RecordDict) -> list[bytes]:
            found = _blobs(configs_of(content, "secagg")["keys"], 2)
            for key in found:  # one that the others could not use would cost all of them
                masking.check_public(key)
                if key in seen:
                    raise UpdateError("its public keys are not its own alone")
                seen.add(key)
            return found

        keys = self._stage("setup", asked, read)
        self._enough("answered with their keys", set(keys))
        return keys

    def _share(self, keys: Mapping[int, list[bytes]]) -> dict[int, dict[int, bytes]]:
        """By client, what it sealed for each neighbour."""
        there = {i: sorted(self.near[i] & keys.keys()) for i in keys}
        asked = {
            i: ConfigRecord({"clients": js, "keys": [key for j in js for key in keys[j]]})
            for i, js in there.items()
        }

        def read(i: int, content: RecordDict) -> dict[int, bytes]:
            record = configs_of(content, "secagg")
            to = [j for j in there[i] if j != i]
            if record["clients"] != to:
                raise UpdateError("its shares are not for its neighbours")
            return dict(zip(to, _blobs(record["boxes"], len(to)), strict=True))

        boxes = self._stage("share", asked, read)
        self._enough("shared their keys", set(boxes))
        return boxes

    def _collect(self, boxes: Mapping[int, Mapping[int, bytes]]) -> set[int]:
        """Who is in the sum. The masked vectors are added up by kind as they come."""
        asked = {}
        for i in boxes:
            sources = [j for j in boxes if i in boxes[j]]
            asked[i] = ConfigRecord(
                {
                    "table": self.table.record(),
                    "clients": sources,
                    "boxes": [boxes[j][i] for j in sources],
                }
            )
        dtype = masking.words(self.terms.bits)

        def read(i: int, content: RecordDict) -> int:
            array = arrays_of(content, "masked")["vector"]
            if array.stype != "fedlora.masked" or len(array.data) != len(self.layout) * (
                dtype.itemsize
            ):
                raise UpdateError(
                    f"its masked vector has {len(array.data)} bytes of {array.stype}, must be "
                    f"{len(self.layout) * dtype.itemsize} of fedlora.masked"
                )
            kind = self.kind_of[i]
            if kind not in self.totals:
                self.totals[kind] = np.zeros(len(self.layout), dtype=dtype)
            self.totals[kind] += np.frombuffer(array.data, dtype=dtype)
            if "start" in content:
                self._begun(i, arrays_of(content, "start"))
            self.keeps[i] = bool(configs_of(content, "reply")["keeps"])
            return kind

        kinds = self._stage("collect", asked, read, bare=False)
        for i, kind in kinds.items():
            if list(kinds.values()).count(kind) < TOGETHER:
                del self.totals[kind]
                reason = "it is the only one left of its ranks: its update would be no sum"
                self._refuse(i, Refusal(FailureKind.ONLY_OF_ITS_RANKS, reason))
        summed = {i for i, kind in kinds.items() if kind in self.totals}
        self._enough("sent their masked update", summed, among=set(boxes))
        return summed

    def _unmask(
        self, keys: Mapping[int, Sequence[bytes]], shared: set[int], summed: set[int]
    ) -> Words:
        """The sum itself."""
        asked = {
            i: ConfigRecord(
                {
                    "active": sorted(self.near[i] & summed),
                    "dead": sorted(self.near[i] & (shared - summed)),
                }
            )
            for i in sorted(summed)
        }

        def read(i: int, content: RecordDict) -> dict[int, bytes]:
            record = configs_of(content, "secagg")
            of = sorted(self.near[i] & shared)
            if record["clients"] != of:
                raise UpdateError("its shares are not those it was asked for")
            return dict(zip(of, _blobs(record["shares"], len(of)), strict=True))

        found = self._stage("unmask", asked, read, lost="its update is in the sum all the same")
        pieces: dict[int, list[bytes]] = {}
        for shares in found.values():
            for i, share in shares.items():
                pieces.setdefault(i, []).append(share)
        self._enough("answered with shares", set(found), among=shared)
        total = np.zeros(len(self.layout), dtype=masking.words(self.terms.bits))
        for part in self.totals.values():
            total += part
        try:
            for i in sorted(shared):
                self._unmasked(total, i, masking.joined(pieces[i]), keys, summed)
        except PrivacyError as e:
            raise self._failed(f"the masks do not come off: {e}") from None
        return total

    def _unmasked(
        self,
        total: Words,
        i: int,
        secret: bytes,
        keys: Mapping[int, Sequence[bytes]],
        summed: set[int],
    ) -> None:
        """Take off, in place, one's own mask; or, of one not in the sum, those towards others."""
        n, bits = len(total), self.terms.bits
        if i in summed:
            np.subtract(total, masking.mask(secret, n, bits), out=total)
            return
        for j in sorted(self.near[i] & summed - {i}):
            shared = masking.pair_mask(secret, keys[j][0], self.told, n, bits)
            masking.cancel(total, i, j, shared)

    # -- messages -----------------------------------------------------------------------------

    def _stage(
        self,
        name: str,
        asked: Mapping[int, ConfigRecord],
        read: Callable[[int, RecordDict], T],
        bare: bool = True,
        lost: str = "",
    ) -> dict[int, T]:
        """One message to each, and what was read from the replies that are as they must be."""
        c = self.setting.config
        seconds = min(c.secure.stage_deadline, c.round.deadline) if bare else c.round.deadline

        def messages() -> Iterable[Message]:
            for i, record in asked.items():
                made = message(
                    self.setting, self.session, self.run, self.client[i], self.round,
                    f"train.secagg_{name}", bare=bare, ttl=seconds,
                )  # fmt: skip
                made.content["secagg"] = record
                size = count_bytes(made.content)
                self.received.down[i] = self.received.down.get(i, 0) + size
                yield made

        begun = time.perf_counter()
        of_node = {self.session.nodes[i]: i for i in asked}
        found: dict[int, T] = {}
        failed: set[int] = set()
        for node, reply in exchange(self.grid, messages(), seconds):
            i = of_node[node]
            try:
                tag_of(reply, self.client[i], self.round, self.run.token)
                found[i] = read(i, reply.content)
                self.up[i] = self.up.get(i, 0) + count_bytes(reply.content)
            except (FedLoraError, KeyError, TypeError, AttributeError) as e:
                error = e if isinstance(e, FedLoraError) else UpdateError(f"the reply lacks {e}")
                failed.add(i)
                self._refuse(i, _at(name, Refusal.of(error), lost))
        for i in sorted(asked.keys() - found.keys() - failed):
            refusal = Refusal(FailureKind.LATE, f"no reply within {seconds:g} s")
            self._refuse(i, _at(name, refusal, lost))
        self.received.waited += time.perf_counter() - begun
        return dict(sorted(found.items()))

    def _refuse(self, i: int, refusal: Refusal) -> None:
        self.received.refuse(i, self.round, refusal)

    def _accept(self, i: int) -> None:
        """Put a client of the sum on record, with what is known of it."""
        facts = facts_of(self.client[i], self.round, self.keeps[i], {}, self.up[i])
        facts["bytes_down"] = self.received.down[i]
        self.received.accepted.append(i)
        self.received.clients[i] = facts
        self.session.observer.client_done(i, facts)

    # -- who is left --------------------------------------------------------------------------

    def _kinds(self, cohort: Sequence[Client]) -> list[Kind]:
        base = base_number(self.setting, self.run.state)
        found = kinds_of(self._sends(c, base) for c in cohort)
        for kind in found:
            if len(kind.clients) < TOGETHER:
                reason = "it is the only one of its ranks in this round: its update would be no sum"
                self._refuse(kind.clients[0].id, Refusal(FailureKind.ONLY_OF_ITS_RANKS, reason))
        return [kind for kind in found if len(kind.clients) >= TOGETHER]

    def _trains(self, c: Client) -> frozenset[str]:
        """The columns that a client of this kind trains."""
        return self.setting.strategy.download(self.run.state, c, self.round).trainable

    def _sends(self, c: Client, base: int) -> tuple[Client, Shapes, Mapping[str, float]]:
        """A client, what it sends, the certificate's changes with it, and at which scales."""
        shapes, scale = self.session.schemas.of(self.run.state, c, base, self.round)
        ranks = {m: layer.rank for m, layer in c.layers.items()}
        cut = cuts(self.setting, self.run)
        others = [] if cut else [name for column, name in shapes if column == "other"]
        return c, {**shapes, **masked_shapes(names_of(ranks, others, cut))}, scale

    def _begun(self, i: int, record: ArrayRecord) -> None:
        """Keep what a client began from, in the clear; raises UpdateError where it is not that."""
        shapes = without_masked(self.kinds[self.kind_of[i]].shapes)
        others = [name for column, name in shapes if column == "other"]
        asked, client = self.round.number, self.client[i]
        (start,) = self.session.certifier.read(record, client, asked, others, (), times=1)
        self.received.certificates[i] = (asked, start, {})

    def _enough(self, did: str, left: set[int], among: set[int] | None = None) -> None:
        need = self.terms.fewest
        nearest = [len(self.near[i] & left) for i in (left if among is None else among)]
        if min(nearest, default=0) < need:
            ring = self.terms.shares < len(self.ids)
            raise self._too_few(
                f"{len(left)} clients {did}, and it takes {need}"
                f"{' among the neighbours of each' if ring else ''} "
                "(secure.reconstruction-threshold)"
            )

    def _too_few(self, what: str) -> FedLoraError:
        said = f"secure aggregation: {what}. Nothing was learned of any client"
        return too_few(self.setting, said, self.round, self.received)

    def _failed(self, what: str) -> RoundError:
        """Of a sum that does not come out: no spent budget is the cause of that."""
        said = f"secure aggregation: {what}. Nothing was learned of any client"
        return RoundError(told(self.setting, said, self.round, self.received))


def _at(stage: str, refusal: Refusal, lost: str) -> Refusal:
    """A refusal that says at which stage, and what was lost with it."""
    told = "; ".join(filter(None, (f"{stage}: {refusal.reason}", lost)))
    return Refusal(refusal.kind, told)


def _blobs(values: Any, n: int) -> list[bytes]:
    """n byte strings of a size that a key or a share can have."""
    if not isinstance(values, list) or len(values) != n:
        raise UpdateError(f"{n} keys or shares were asked for, and something else came")
    if any(not isinstance(x, bytes) or len(x) > LONGEST for x in values):
        raise UpdateError("a key or share is not of its kind")
    return values
