"""A client's five stages of secure aggregation; its secrets are kept from one to the next.

    <memory>/secure/round-00003.<next stage>.json     readable by its owner alone

Every message may be a process of its own, and neither a warm worker nor LocalGrid's worker
processes hand a `Context` back, so the secrets are in a file and not in `Context.state`. A stage
takes the file away before it begins and leaves one for the next stage when it is done. So

    the same stage asked twice          finds no file: refused
    a client that died within a stage   left no file: it is a drop-out of the round
    after the last stage                nothing is left

Formal guarantee
    Of one round and start of the server, a client sends at most one masked vector, masked by the
    digest of the one agreement it was shown; signs one set of survivors; and gives of every
    neighbour either the share of its mask's seed or that of its private key, never both, where at
    least the threshold of members, whose keys it believes, signed the same agreement and survivors.
    Where all are neighbours and no more than `colluding` of them help the server, no two sets of
    survivors have that many signatures: so a server that learns how a vector was masked towards
    others never learns the mask that is the client's own.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config.members import Members
from fedlora.errors import PrivacyError
from fedlora.federation.secure import masking, signing
from fedlora.federation.secure.agreement import Agreement, RoundName
from fedlora.federation.secure.masking import Words
from fedlora.federation.secure.signing import RoundKeys
from fedlora.federation.secure.terms import Terms
from fedlora.federation.wire.messages import Shapes
from fedlora.federation.wire.sent_digest import Sent
from fedlora.lora.tree_file import write_atomically

Boxes = Mapping[int, bytes]
"""Encrypted shares by client."""
TermsOf = Callable[[int], Terms]
"""The run's terms, for a cohort of this size."""
TRUSTING = Members()
"""Of a client without a list of members: the server says whose each key is."""


class SecureClient:
    """One client's part in one round of secure aggregation."""

    def __init__(
        self,
        directory: Path,
        client: int,
        name: RoundName,
        identity: bytes | None = None,
        members: Members = TRUSTING,
        together: int = 0,
        certificate: bytes = b"",
    ) -> None:
        """`directory` is the client's own, of this run; `identity` the private key it signs with.

        Without one it makes one, and keeps it in that directory. together: how many clients of one
        kind it demands, where that is more than the run's terms do. certificate: an authority's
        word on its identity, which it shows the others.
        """
        self.directory = directory
        self.me = client
        self.name = name
        self.round, self.incarnation = name.round, name.incarnation
        self.members = members
        self.together = together
        self._given = identity
        self._certificate = certificate

    # -- the stages ---------------------------------------------------------------------------

    def setup(self, agreement: Agreement, cohort_terms: TermsOf) -> RoundKeys:
        """Two fresh public keys, signed with what all agree on. What other rounds left is removed.

        Raises:
            PrivacyError: what all are to agree on is not so, as far as this client can tell; or
                this round was begun before.
        """
        terms = cohort_terms(len(agreement.table.kinds))
        agreement.check(self.me, self.name, terms, self.together)
        self._begin()
        (sk1, pk1), (sk2, pk2) = masking.key_pair(), masking.key_pair()
        identity, text = self._identity(), self._keys_text(self.me, pk1, pk2, agreement)
        signed = signing.public_half(identity), signing.sign(identity, text), self._certificate
        keys = RoundKeys(pk1, pk2, *signed)
        own, told = [*keys], agreement.record()
        self.leave("share", agreement=told, sk1=sk1, sk2=sk2, own=own)
        return keys

    def share(self, keys: Mapping[int, RoundKeys], cohort_terms: TermsOf) -> Boxes:
        """Encrypted shares of this client's mask seed and private key, one for each neighbour.

        Raises:
            PrivacyError: a key is unknown, revoked, there twice, or not signed by who it is said to
                be of, with this agreement; or there are too few.
        """
        s = self._take("share")
        agreement = self._agreed(s, cohort_terms)
        terms = agreement.terms
        if len(keys) < terms.threshold or len(keys) > terms.shares:
            raise PrivacyError.public(
                f"{len(keys)} neighbours: must be {terms.threshold} to {terms.shares}"
            )
        if not keys.keys() <= agreement.table.kinds.keys():
            raise PrivacyError.public("keys came of clients that are not in the table")
        if self.me not in keys or keys[self.me] != RoundKeys(*s["own"]):
            raise PrivacyError.public("the server shows this client other keys than its own")
        shown = [key for k in keys.values() for key in (k.masks, k.boxes)]
        if len({*shown}) != len(shown) or len({k.identity for k in keys.values()}) != len(keys):
            raise PrivacyError.public("two public keys are the same")
        for i, k in keys.items():
            if i != self.me:
                self.members.check(i, k.identity, k.certificate)
                text = self._keys_text(i, k.masks, k.boxes, agreement)
                if not signing.signed_by(k.identity, k.signature, text):
                    raise PrivacyError.public(
                        f"client {i} did not sign these keys, or was told of another agreement"
                    )
        seed = masking.fresh_seed()
        pieces = zip(
            sorted(keys),
            masking.split(seed, terms.threshold, terms.shares),
            masking.split(s["sk1"], terms.threshold, terms.shares),
            strict=False,
        )
        boxes, own = {}, {}
        for i, b, k1 in pieces:
            if i == self.me:
                own[i] = (b, k1)
            else:
                boxes[i] = masking.seal(s["sk2"], keys[i].boxes, self.me, i, b, k1)
        shown_keys = {i: [*k] for i, k in keys.items()}
        self.leave("collect", **s, seed=seed, keys=shown_keys, shares=own)
        return boxes

    def open(self, boxes: Boxes, cohort_terms: TermsOf) -> "Masker":
        """The masks for one vector of this round, and no second one: called before the training."""
        s = self._take("collect")
        agreement, keys = self._agreed(s, cohort_terms), s["keys"]
        if not boxes.keys() < keys.keys() or self.me in boxes:
            raise PrivacyError.public("shares came from clients whose keys did not")
        if len(boxes) + 1 < agreement.terms.threshold:
            raise PrivacyError.public(
                f"{len(boxes) + 1} of this client's neighbours sent shares, "
                f"secure.reconstruction-threshold = {agreement.terms.threshold}"
            )
        for i, box in boxes.items():
            s["shares"][i] = masking.unseal(s["sk2"], keys[i][1], i, self.me, box)
        return Masker(self, s, agreement)

    def agree(self, survivors: Collection[int], cohort_terms: TermsOf) -> bytes:
        """A signature under who is in the sum: of one set only, since no second one is answered.

        Raises:
            PrivacyError: this client is not in it, somebody is whose shares did not come, or it is
                too small a sum, of all or of the clients of one kind. Nothing is signed, nor later.
        """
        s = self._take("agree")
        agreement, alive = self._agreed(s, cohort_terms), set(survivors)
        terms, kinds, near = agreement.terms, agreement.table.kinds, alive & set(s["shares"])
        if self.me not in alive or not alive <= kinds.keys() or len(alive) != len(survivors):
            raise PrivacyError.public("the clients named are not those of this client's sum")
        if not terms.ring and alive != near:
            raise PrivacyError.public("the clients named are not those of this client's shares")
        if len(near) < terms.fewest:
            raise PrivacyError.public(
                f"a sum over {len(near)} of this client's neighbours: must be {terms.fewest} at "
                f"least (secure.reconstruction-threshold = {terms.threshold}, secure.colluding = "
                f"{terms.colluding}; of a sum of two, either knows the other's part)"
            )
        together = max(terms.together, self.together)
        if min(Counter(kinds[i] for i in alive).values()) < together:
            raise PrivacyError.public(
                f"the server says that all but fewer than {together} clients of one kind are gone: "
                "what only those send would be no sum, or one with clients that help the server "
                "(secure.colluding)"
            )
        text = self._survivors_text(agreement, alive)
        self.leave("unmask", **s, survivors=sorted(alive))
        return signing.sign(self._identity(), text)

    def unmask(self, signatures: Mapping[int, bytes], cohort_terms: TermsOf) -> dict[int, bytes]:
        """For each neighbour, the share of its seed if it is in the sum, else of its private key.

        Raises:
            PrivacyError: fewer than the threshold of the sum's members signed what this client did.
                Nothing is sent then, nor later.
        """
        s = self._take("unmask")
        agreement, alive = self._agreed(s, cohort_terms), set(s["survivors"])
        text, signed = self._survivors_text(agreement, alive), {self.me}
        for i, signature in signatures.items():
            if i in alive and i in s["identities"] and i != self.me:
                identity, certificate = s["identities"][i]
                self.members.check(i, identity, certificate)
                if signing.signed_by(identity, signature, text):
                    signed.add(i)
        if len(signed) < agreement.terms.threshold:
            raise PrivacyError.public(
                f"{len(signed)} members signed that the sum is over the clients that this one was "
                f"told of: must be {agreement.terms.threshold} (secure.reconstruction-threshold). "
                "The others did not answer, or were told another story"
            )
        return {i: b if i in alive else k for i, (b, k) in s["shares"].items()}

    # -- what is signed -----------------------------------------------------------------------

    def _identity(self) -> bytes:
        """The private key that this client signs with."""
        if self._given is not None:
            return self._given
        path = self.directory / "identity.key"
        if not path.exists():
            write_atomically(path, signing.new_identity())
        return path.read_bytes()

    def _keys_text(self, i: int, masks: bytes, boxes: bytes, agreement: Agreement) -> bytes:
        n = self.name
        return signing.keys_text(n.run, n.incarnation, n.round, i, masks, boxes, agreement.digest())

    def _survivors_text(self, agreement: Agreement, survivors: Collection[int]) -> bytes:
        n, agreed = self.name, agreement.digest()
        return signing.survivors_text(n.run, n.incarnation, n.round, agreed, survivors)

    def _agreed(self, state: Mapping[str, Any], cohort_terms: TermsOf) -> Agreement:
        """What this client agreed to, where this stage's message is of it: same run, round, config,
        start of the server and its date; and under terms that are still its own.

        Raises:
            PrivacyError: it is of another. Who trains under another config than the rest, which
                would teach it nothing, leaves the sum to them.
        """
        agreement = Agreement.read(state["agreement"])
        if agreement.name != self.name:
            raise PrivacyError.public(
                "this stage is of another run, round, config or start than what all agreed on"
            )
        if cohort_terms(agreement.terms.cohort) != agreement.terms:
            raise PrivacyError.public("the terms of the sum are not those of the run's config")
        return agreement

    # -- files --------------------------------------------------------------------------------

    def _begin(self) -> None:
        mark = self.directory / "begun.json"
        begun: dict[str, Any] = json.loads(mark.read_text()) if mark.exists() else {}
        if isinstance(last := begun.get("incarnation"), str):  # before there were all of them
            begun = {last: begun["round"]}
        if begun.get(self.incarnation, -1) >= self.round:
            raise PrivacyError.public(
                f"round {self.round} was begun before: a second vector of it, masked anew, "
                "would give away what a client adds"
            )
        for old in self.directory.glob("round-*"):
            old.unlink(missing_ok=True)
        write_atomically(mark, json.dumps({**begun, self.incarnation: self.round}).encode())

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

    def __init__(self, member: SecureClient, state: dict[str, Any], agreement: Agreement) -> None:
        self.member = member
        self.state = state
        self.agreement = agreement

    def check_sent(self, came: Sent) -> None:
        """Raises PrivacyError where the download is not the one that all were told of."""
        self.agreement.check_sent(self.member.me, came)

    def kind(self, sends: Shapes, trains: Collection[str], own: bool = False) -> int:
        """This client's kind, by a table that is true of it.

        Raises:
            PrivacyError: see `MemberTable.check_own`.
        """
        return self.agreement.table.check_own(self.member.me, sends, trains, own)

    def masked(self, vector: Words) -> Words:
        """The vector under its own mask and one for each neighbour; after it none can follow."""
        s, n, bits = self.state, len(vector), self.agreement.terms.bits
        told = self.agreement.digest()
        total = vector + masking.mask(s["seed"], n, bits)
        for i in s["shares"]:
            if i != self.member.me:
                shared = masking.pair_mask(s["sk1"], s["keys"][i][0], told, n, bits)
                masking.cancel(total, self.member.me, i, shared)
        identities = {i: (s["keys"][i][2], s["keys"][i][4]) for i in s["shares"]}
        agreement, shares = s["agreement"], s["shares"]
        self.member.leave("agree", agreement=agreement, shares=shares, identities=identities)
        return np.asarray(total)


PLAIN = ("incarnation", "agreement")
"""What is text in what a member keeps; all other text is bytes, in hexadecimal digits."""


def _text(x: Any) -> Any:
    """Bytes as hexadecimal text, for JSON."""
    if isinstance(x, bytes):
        return x.hex()
    if isinstance(x, Mapping):
        return {str(key): _text(value) for key, value in x.items()}
    return [_text(value) for value in x] if isinstance(x, tuple | list) else x


def _bytes(x: Any) -> Any:
    """The inverse of `_text` for what a member keeps."""
    if isinstance(x, dict):
        return {
            int(key) if re.fullmatch(r"\d+", key) else key: (
                value if key in PLAIN else _bytes(value)
            )
            for key, value in x.items()
        }
    if isinstance(x, list):
        return tuple(_bytes(value) for value in x)
    return bytes.fromhex(x) if isinstance(x, str) else x
