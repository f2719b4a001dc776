"""The server's five stages of secure aggregation, after which it has the sum and nothing else.

    setup     U0: public keys, signed with what all agree on (secure_cohort.py)
    share     U1: encrypted shares, each forwarded to whom it is for
    collect   U2: the masked vectors of those that trained, summed as they come
    agree     U3: who is in the sum, signed by those that are
    unmask    U4: shares, of the own seed of each of U3 and of the key of each of U1 that is not

The sum leaves as one upload a kind (see `vector`), so the strategies stay unaware. A client that
is lost at any stage costs its own update, as long as `threshold` of every client's neighbours are
left; else the round ends with a RoundError, with nothing learned and the checkpoint intact. Where
all that were lost say that their budget is spent, it is BudgetSpent.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import FedLoraError, PrivacyError, RoundError, UpdateError
from fedlora.federation.secure import masking, signing
from fedlora.federation.secure.masking import Words
from fedlora.federation.secure.signing import RoundKeys
from fedlora.federation.secure.vector import decode, fit
from fedlora.federation.server import certification
from fedlora.federation.server.client_words import facts_of
from fedlora.federation.server.exchange import Received
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import Session, Setting, told, too_few
from fedlora.federation.server.secure_cohort import SecureCohort, alone
from fedlora.federation.server.secure_stage import Stages, blobs
from fedlora.federation.wire.certificate import WITHIN, without_changes, without_masked
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.federation.wire.messages import arrays_of, configs_of
from fedlora.strategies.base import Client, Round, Upload
from fedlora.training.certificate import public_scales

IN_THE_SUM = "its update is in the sum all the same"


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
        self.setting, self.session = setting, session
        self.round, self.received = round, received
        found = SecureCohort.of(setting, session, run, cohort, round, received)
        self.kinds, self.kind_of, self.client = found.kinds, found.kind_of, found.client
        self.ids, self.terms, self.near = found.ids, found.terms, found.near
        if reason := self.terms.problem():
            raise self._too_few(f"{len(self.ids)} clients are enough of their ranks. {reason}")
        self.agreement = found.agreement(setting, session, run, round)
        self.told, self.layout = self.agreement.digest(), self.agreement.table.layout
        session.certifier.agreed[round.number] = self.agreement.probes
        certification.measure(setting, session, run, round.number, run.state)
        names = {n.removeprefix(WITHIN) for _, n in self.layout.shapes if n.startswith(WITHIN)}
        self.scales = public_scales(setting.model, sorted(names))
        self.stages = Stages(setting, session, run, grid, self.client, round, received)
        self.totals: dict[int, Words] = {}
        self.keeps: dict[int, bool] = {}

    def sum(self) -> list[Upload]:
        """All five stages."""
        keys = self._setup()
        boxes = self._share(keys)
        shared = set(boxes)
        summed = self._collect(boxes)
        signed = self._agree(keys, summed)
        total = self._unmask(keys, shared, summed, signed)
        try:
            found, loss, error = decode(total, len(summed), self.layout, self.kinds, self.terms)
        except UpdateError as e:
            raise self._failed(str(e)) from None
        N = sum(u.num_examples for u in found)
        found, change = without_changes(found, self.scales)
        errors = error, self.terms.change_error(len(summed), N)
        self.received.summed = change, errors, self.scales
        if (fits := fit(total, self.layout)) != len(summed):
            self.received.uncertified = (
                f"secure aggregation: the certificate's changes of {len(summed) - fits} of "
                f"{len(summed)} clients were out of range"
            )
        self.received.loss = None if self.setting.config.privacy.on else loss
        self.received.secure = {
            "asked": len(self.ids),
            "summed": len(summed),
            "signed": len(signed),
            "shares": self.terms.shares,
            "threshold": self.terms.threshold,
            "colluding": self.terms.colluding,
            "error": error,
        }
        for i in sorted(summed):
            self._accept(i)
        return found

    # -- the stages ---------------------------------------------------------------------------

    def _setup(self) -> dict[int, RoundKeys]:
        asked = {i: ConfigRecord({"agreement": self.agreement.record()}) for i in self.ids}
        seen: set[bytes] = set()

        def read(i: int, content: RecordDict) -> RoundKeys:
            keys = RoundKeys(*blobs(configs_of(content, "secagg")["keys"], len(RoundKeys._fields)))
            for key in keys[:2]:  # one that the others could not use would cost all of them
                masking.check_public(key)
            if seen & {*keys[:3]} or len({*keys[:3]}) < 3:
                raise UpdateError("its public keys are not its own alone")
            name = self.agreement.name
            text = signing.keys_text(
                name.run, name.incarnation, name.round, i, keys.masks, keys.boxes, self.told
            )
            if not signing.signed_by(keys.identity, keys.signature, text):
                raise UpdateError("its keys are not signed")
            seen.update(keys[:3])
            return keys

        keys = self.stages.ask("setup", asked, read)
        self._enough("answered with their keys", set(keys))
        return keys

    def _share(self, keys: Mapping[int, RoundKeys]) -> dict[int, dict[int, bytes]]:
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
            return dict(zip(to, blobs(record["boxes"], len(to)), strict=True))

        boxes = self.stages.ask("share", asked, read)
        self._enough("shared their keys", set(boxes))
        return boxes

    def _collect(self, boxes: Mapping[int, Mapping[int, bytes]]) -> set[int]:
        """Who is in the sum. The masked vectors are added up by kind as they come."""
        asked = {}
        for i in boxes:
            sources = [j for j in boxes if i in boxes[j]]
            sealed = [boxes[j][i] for j in sources]
            asked[i] = ConfigRecord({"clients": sources, "boxes": sealed})
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

        kinds = self.stages.ask("collect", asked, read, bare=False)
        left = Counter(kinds.values())
        for i, kind in kinds.items():
            if left[kind] < self.terms.together:
                self.totals.pop(kind, None)
                reason = alone(left[kind], self.terms.together, "left")
                self.stages.refuse(i, Refusal(FailureKind.ONLY_OF_ITS_RANKS, reason))
        summed = {i for i, kind in kinds.items() if kind in self.totals}
        self._enough("sent their masked update", summed, among=set(boxes))
        return summed

    def _agree(self, keys: Mapping[int, RoundKeys], summed: set[int]) -> dict[int, bytes]:
        """By client, its signature under who is in the sum."""
        survivors, name = sorted(summed), self.agreement.name
        text = signing.survivors_text(name.run, name.incarnation, name.round, self.told, survivors)

        def read(i: int, content: RecordDict) -> bytes:
            (signature,) = blobs([configs_of(content, "secagg")["signature"]], 1)
            if not signing.signed_by(keys[i].identity, signature, text):
                raise UpdateError("its signature is not under who is in the sum")
            return signature

        asked = {i: ConfigRecord({"survivors": survivors}) for i in survivors}
        signed = self.stages.ask("agree", asked, read, lost=IN_THE_SUM)
        near = [len(self.near[i] & signed.keys()) for i in signed]
        if min(near, default=0) < self.terms.threshold:
            raise self._too_few(
                f"{len(signed)} clients signed who is in the sum, and it takes "
                f"{self.terms.threshold} (secure.reconstruction-threshold)"
            )
        return signed

    def _unmask(
        self,
        keys: Mapping[int, RoundKeys],
        shared: set[int],
        summed: set[int],
        signed: Mapping[int, bytes],
    ) -> Words:
        """The sum itself."""
        asked = {}
        for i in signed:
            near = sorted(self.near[i] & signed.keys())
            asked[i] = ConfigRecord({"clients": near, "signatures": [signed[j] for j in near]})

        def read(i: int, content: RecordDict) -> dict[int, bytes]:
            record = configs_of(content, "secagg")
            of = sorted(self.near[i] & shared)
            if record["clients"] != of:
                raise UpdateError("its shares are not those it was asked for")
            return dict(zip(of, blobs(record["shares"], len(of)), strict=True))

        found = self.stages.ask("unmask", asked, read, lost=IN_THE_SUM)
        pieces: dict[int, list[bytes]] = {}
        for shares in found.values():
            for i, share in shares.items():
                pieces.setdefault(i, []).append(share)
        answered = [len(self.near[i] & found.keys()) for i in shared]
        if min(answered, default=0) < self.terms.threshold:
            raise self._too_few(
                f"{len(found)} clients answered with shares, and it takes {self.terms.threshold} "
                "(secure.reconstruction-threshold)"
            )
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
        keys: Mapping[int, RoundKeys],
        summed: set[int],
    ) -> None:
        """Take off, in place, one's own mask; or, of one not in the sum, those towards others."""
        n, bits = len(total), self.terms.bits
        if i in summed:
            np.subtract(total, masking.mask(secret, n, bits), out=total)
            return
        for j in sorted(self.near[i] & summed - {i}):
            shared = masking.pair_mask(secret, keys[j].masks, self.told, n, bits)
            masking.cancel(total, i, j, shared)

    def _accept(self, i: int) -> None:
        """Put a client of the sum on record, with what is known of it."""
        facts = facts_of(self.client[i], self.round, self.keeps[i], {}, self.stages.up[i])
        facts["bytes_down"] = self.received.down[i]
        self.received.accepted.append(i)
        self.received.clients[i] = facts
        self.session.observer.client_done(i, facts)

    # -- who is left --------------------------------------------------------------------------

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
