"""A client's four stages of secure aggregation; its secrets are kept from one to the next.

    <memory>/secure/round-00003.<next stage>.json     readable by its owner alone

Every message may be a process of its own, and neither a warm worker nor LocalGrid's worker
processes hand a `Context` back, so the secrets are in a file and not in `Context.state`. A stage
takes the file away before it begins and leaves one for the next stage when it is done. So

    the same stage asked twice          finds no file: refused
    a client that died within a stage   left no file: it is a drop-out of the round
    after the last stage                nothing is left

Formal guarantee
    Of one round and start of the server, a client sends at most one masked vector; of every
    neighbour either the share of its mask's seed or that of its private key, never both; and no
    share at all where fewer than the threshold of its neighbours answered, or (where all are
    neighbours) where one alone of a kind did. So a server that learns how a vector was masked
    towards others never learns the mask that is the client's own.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.errors import PrivacyError
from fedlora.federation.secure import masking
from fedlora.federation.secure.agreement import MemberTable
from fedlora.federation.secure.masking import Words
from fedlora.federation.secure.rules import TOGETHER
from fedlora.federation.secure.terms import SMALLEST, Terms
from fedlora.federation.wire.messages import Shapes
from fedlora.lora.tree_file import write_atomically

Boxes = Mapping[int, bytes]
"""Encrypted shares by client."""
Keys = Mapping[int, tuple[bytes, bytes]]
"""Each client's public keys: for masks, and for encryption."""
TermsOf = Callable[[int], Terms]
"""The run's terms, for a cohort of this size."""


class SecureClient:
    """One client's part in one round of secure aggregation."""

    def __init__(self, directory: Path, client: int, round: int, incarnation: str) -> None:
        """`directory` is the client's own, of this run; `incarnation` names the server's start."""
        self.directory = directory
        self.me = client
        self.round = round
        self.incarnation = incarnation

    # -- the stages ---------------------------------------------------------------------------

    def setup(self, terms: Terms) -> tuple[bytes, bytes]:
        """Two fresh public keys. What was left of other rounds is removed.

        Raises:
            PrivacyError: too few clients, or this round was begun before.
        """
        if terms.cohort < SMALLEST:
            raise PrivacyError.public(
                f"a sum over {terms.cohort} clients: must be {SMALLEST} at least"
            )
        if 2 * terms.threshold <= terms.shares:
            raise PrivacyError.public(
                f"secure.reconstruction-threshold = {terms.threshold} of {terms.shares} shares of "
                f"{terms.cohort} clients: must be more than half, else two sets of clients can "
                "be told two stories"
            )
        self._begin()
        (sk1, pk1), (sk2, pk2) = masking.key_pair(), masking.key_pair()
        self.leave("share", cohort=terms.cohort, sk1=sk1, pk1=pk1, sk2=sk2, pk2=pk2)
        return pk1, pk2

    def share(self, keys: Keys, cohort_terms: TermsOf) -> Boxes:
        """Encrypted shares of this client's mask seed and private key, one for each neighbour."""
        s = self._take("share")
        terms = cohort_terms(s["cohort"])
        if len(keys) < terms.threshold or len(keys) > terms.shares:
            raise PrivacyError.public(
                f"{len(keys)} neighbours: must be {terms.threshold} to {terms.shares}"
            )
        if keys.get(self.me) != (s["pk1"], s["pk2"]):
            raise PrivacyError.public("the server shows this client other keys than its own")
        if len({key for pair in keys.values() for key in pair}) != 2 * len(keys):
            raise PrivacyError.public("two public keys are the same")
        seed = masking.fresh_seed()
        pieces = zip(
            sorted(keys),
            masking.split(seed, terms.threshold, terms.shares),
            masking.split(s["sk1"], terms.threshold, terms.shares),
            strict=False,
        )
        boxes, own = {}, {}
        for i, b, k in pieces:
            if i == self.me:
                own[i] = (b, k)
            else:
                boxes[i] = masking.seal(s["sk2"], keys[i][1], self.me, i, b, k)
        self.leave("collect", **s, seed=seed, keys=dict(keys), shares=own)
        return boxes

    def open(self, boxes: Boxes, cohort_terms: TermsOf) -> "Masker":
        """The masks for one vector of this round, and no second one: called before the training."""
        s = self._take("collect")
        terms, keys = cohort_terms(s["cohort"]), s["keys"]
        if not boxes.keys() < keys.keys() or self.me in boxes:
            raise PrivacyError.public("shares came from clients whose keys did not")
        if len(boxes) + 1 < terms.threshold:
            raise PrivacyError.public(
                f"{len(boxes) + 1} of this client's neighbours sent shares, "
                f"secure.reconstruction-threshold = {terms.threshold}"
            )
        for i, box in boxes.items():
            s["shares"][i] = masking.unseal(s["sk2"], keys[i][1], i, self.me, box)
        return Masker(self, s, terms)

    def unmask(
        self, active: Sequence[int], dead: Sequence[int], cohort_terms: TermsOf
    ) -> dict[int, bytes]:
        """For each neighbour, the share of its seed if it answered, else of its private key.

        Raises:
            PrivacyError: both are asked of one, or for fewer clients than the threshold, or for
                others than whose shares are here. Nothing is sent then, nor later.
        """
        s = self._take("unmask")
        terms, shares = cohort_terms(s["cohort"]), s["shares"]
        if both := set(active) & set(dead):
            raise PrivacyError.public(
                f"both secrets of client {min(both)} are asked for, which would unmask it"
            )
        if {*active, *dead} != set(shares) or self.me not in active:
            raise PrivacyError.public("the clients named are not those of this client's shares")
        if len(set(active)) < terms.fewest:
            raise PrivacyError.public(
                f"a sum over {len(set(active))} of this client's neighbours: must be "
                f"{terms.fewest} at least (secure.reconstruction-threshold = {terms.threshold}; of "
                "a sum of two, either knows the other's part)"
            )
        of_kind = Counter(s["kinds"][i] for i in set(active))
        if terms.shares == terms.cohort and min(of_kind.values()) < TOGETHER:
            raise PrivacyError.public(
                "the server says that all clients but one of its ranks are gone: what only that "
                "one sends would be no sum"
            )
        return {i: shares[i][0] for i in active} | {i: shares[i][1] for i in dead}

    # -- files --------------------------------------------------------------------------------

    def _begin(self) -> None:
        mark = self.directory / "begun.json"
        if mark.exists():
            begun = json.loads(mark.read_text())
            if begun["incarnation"] == self.incarnation and begun["round"] >= self.round:
                raise PrivacyError.public(
                    f"round {self.round} was begun before: a second vector of it, masked anew, "
                    "would give away what a client adds"
                )
        for old in self.directory.glob("round-*"):
            old.unlink(missing_ok=True)
        found = {"incarnation": self.incarnation, "round": self.round}
        write_atomically(mark, json.dumps(found).encode())

    def _file(self, stage: str) -> Path:
        return self.directory / f"round-{self.round:05}.{stage}.json"

    def _take(self, stage: str) -> dict[str, Any]:
        """What the stage before left, which is then gone."""
        taken = self._file(stage).with_suffix(".taken")
        try:
            os.rename(self._file(stage), taken)
        except FileNotFoundError:
            raise PrivacyError.public(
                f"client {self.me} is not at stage {stage!r} of round {self.round}: it was asked "
                "before, or the stage before it did not end; nothing was sent"
            ) from None
        found: dict[str, Any] = _bytes(json.loads(taken.read_text()))
        taken.unlink()
        if found.pop("incarnation") != self.incarnation:
            raise PrivacyError.public(
                f"round {self.round} was begun by another start of the server"
            )
        return found

    def leave(self, stage: str, **state: Any) -> None:
        data = json.dumps(_text({**state, "incarnation": self.incarnation}))
        write_atomically(self._file(stage), data.encode())


class Masker:
    """The masks of one vector."""

    def __init__(self, member: SecureClient, state: dict[str, Any], terms: Terms) -> None:
        self.member = member
        self.state = state
        self.terms = terms

    def kind(self, table: MemberTable, sends: Shapes, trains: Collection[str]) -> int:
        """This client's kind by a table that is true of it, and of the clients it was shown.

        Raises:
            PrivacyError: see `MemberTable.check`.
        """
        return table.check(self.member.me, sends, trains, self.state["keys"], self.state["cohort"])

    def masked(self, vector: Words, table: MemberTable) -> Words:
        """The vector under its own mask and one for each neighbour; after it none can follow."""
        s, n, bits = self.state, len(vector), self.terms.bits
        told = table.digest(self.terms, self.member.round, self.member.incarnation)
        total = vector + masking.mask(s["seed"], n, bits)
        for i in s["shares"]:
            if i != self.member.me:
                shared = masking.pair_mask(s["sk1"], s["keys"][i][0], told, n, bits)
                masking.cancel(total, self.member.me, i, shared)
        kinds = dict(table.kinds)
        self.member.leave("unmask", cohort=s["cohort"], shares=s["shares"], kinds=kinds)
        return np.asarray(total)


def _text(x: Any) -> Any:
    """Bytes as hexadecimal text, for JSON."""
    if isinstance(x, bytes):
        return x.hex()
    if isinstance(x, Mapping):
        return {str(key): _text(value) for key, value in x.items()}
    return [_text(value) for value in x] if isinstance(x, tuple | list) else x


def _bytes(x: Any) -> Any:
    """The inverse of `_text` for what a member keeps; "round" and names are no secrets."""
    if isinstance(x, dict):
        return {
            int(key) if re.fullmatch(r"\d+", key) else key: (
                value if key == "incarnation" else _bytes(value)
            )
            for key, value in x.items()
        }
    if isinstance(x, list):
        return tuple(_bytes(value) for value in x)
    return bytes.fromhex(x) if isinstance(x, str) else x
