"""A server that does not follow secure aggregation: does it read one client?

    other tables      each client is told of another agreement, so of a place of its own in the sum
    two sums          half of the clients are told that the victim is in the sum, half that it is
                      gone, to have the shares of both of its secrets
    forged keys       all neighbours' keys are the server's own
    forged, listed    the same where the victim has a list of the members' keys

Bonawitz et al., 2017, https://eprint.iacr.org/2017/281, sections 6 and 8. Played with the clients'
own code (`secure_client.SecureClient`) on vectors of known numbers: no model, no training. Where
more clients help than `secure.colluding` allows for, and where keys come from the server alone, the
attack must succeed: what never succeeds shows nothing.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedlora.config.members import Members
from fedlora.errors import PrivacyError
from fedlora.federation.client.secure_client import TRUSTING, SecureClient
from fedlora.federation.secure import masking, signing
from fedlora.federation.secure.agreement import Agreement, RoundName, table_of
from fedlora.federation.secure.masking import Words
from fedlora.federation.secure.signing import RoundKeys
from fedlora.federation.secure.terms import Terms

N, C, THRESHOLD, BITS = 6, 1, 4, 32
"""Clients, those that may help, and the threshold that follows."""
LENGTH = 64
NAME = RoundName("config", "audit", 1, "start")
VICTIM = 0

STORIES = (
    ("other tables", 0), ("two sums", 0), ("two sums", C), ("two sums", C + 1),
    ("forged, listed", 0), ("forged keys", 0),
)  # fmt: skip
"""What is told, and how many clients help the server."""
BROKEN = {("two sums", C + 1), ("forged keys", 0)}
"""Those that read the victim, as the documentation says."""


def terms_of(cohort: int) -> Terms:
    return Terms(cohort, cohort, THRESHOLD, BITS, 8.0, 100, C)


def told(of: int = 0) -> Agreement:
    """What all agree on; another one for each `of`."""
    table = table_of([{("A", f"m{of}"): (LENGTH,)}], [["A"]], dict.fromkeys(range(N), 0))
    return Agreement(NAME, terms_of(N), table, (("form", "content"),))


class Server:
    """All clients of one round, what they hold on disk, and the vectors they mask."""

    def __init__(self, root: Path, agreements: Sequence[Agreement], listed: bool = False) -> None:
        self.root, self.agreements = root, agreements
        self.identities = [signing.new_identity() for _ in range(N)]
        keys = {i: signing.public_half(x) for i, x in enumerate(self.identities)}
        members = Members(keys) if listed else TRUSTING
        self.clients = [
            SecureClient(root / str(i), i, NAME, self.identities[i], members) for i in range(N)
        ]
        self.keys = {
            c.me: c.setup(a, terms_of) for c, a in zip(self.clients, agreements, strict=True)
        }
        rng = np.random.default_rng(0)
        self.vectors = rng.integers(0, 1000, (N, LENGTH)).astype(masking.words(BITS))

    def forged(self, victim: RoundKeys) -> dict[int, tuple[bytes, bytes, RoundKeys]]:
        """For each other client two private keys of the server's own, and their public halves."""
        found = {}
        for i in set(range(N)) - {VICTIM}:
            (sk1, pk1), (sk2, pk2), identity = (
                masking.key_pair(), masking.key_pair(), signing.new_identity())  # fmt: skip
            text = signing.keys_text(
                NAME.run, NAME.incarnation, NAME.round, i, pk1, pk2, self.agreements[0].digest()
            )
            shown = RoundKeys(pk1, pk2, signing.public_half(identity), signing.sign(identity, text))
            found[i] = (sk1, sk2, shown)
        return found


def read(story: str, helpers: int) -> bool:
    """Does the server read the victim's vector?"""
    with tempfile.TemporaryDirectory() as root:
        try:
            if story == "other tables":
                return _tables(Server(Path(root), [told(i) for i in range(N)]))
            server = Server(Path(root), [told()] * N, listed=story == "forged, listed")
            return _two_sums(server, helpers) if story == "two sums" else _forged(server)
        except PrivacyError:  # a client refused
            return False


def _tables(server: Server) -> bool:
    """The sum, each update in the place its client was told."""
    boxes = {c.me: c.share(server.keys, terms_of) for c in server.clients}
    return bool(boxes)


def _two_sums(server: Server, helpers: int) -> bool:
    clients, digest = server.clients, told().digest()
    boxes = {c.me: c.share(server.keys, terms_of) for c in clients}
    masked = {}
    for c in clients:
        came = {j: boxes[j][c.me] for j in boxes if j != c.me}
        masked[c.me] = c.open(came, terms_of).masked(server.vectors[c.me].copy())
    helping, honest = [*range(N - helpers, N)], [*range(N - helpers)]
    half = (len(honest) + 1) // 2
    kept = server.root / "kept"
    for i in helping:
        shutil.copytree(clients[i].directory, kept / str(i))
    secrets = []
    everyone, gone = [*range(N)], [i for i in range(N) if i != VICTIM]
    for among, survivors in ((honest[:half], everyone), (honest[half:], gone)):
        for i in helping:  # who helps signs both
            shutil.copytree(kept / str(i), clients[i].directory, dirs_exist_ok=True)
        told_so = [*among, *helping]
        signed = {i: clients[i].agree(survivors, terms_of) for i in told_so}
        pieces = [clients[i].unmask(signed, terms_of)[VICTIM] for i in told_so]
        secrets.append(masking.joined(pieces))
    seed, private = secrets
    found = masked[VICTIM] - masking.mask(seed, LENGTH, BITS)
    return _right(server, found - _pairs(private, server.keys, digest))


def _forged(server: Server) -> bool:
    victim, own = server.clients[VICTIM], server.keys[VICTIM]
    forged = server.forged(own)
    shown = {VICTIM: own, **{i: keys for i, (_, _, keys) in forged.items()}}
    boxes = victim.share(shown, terms_of)
    pieces = [masking.unseal(forged[i][1], own.boxes, VICTIM, i, box) for i, box in boxes.items()]
    seed, private = (masking.joined(x) for x in zip(*pieces, strict=True))
    filler = masking.split(masking.fresh_seed(), THRESHOLD, N)
    sealed = {
        i: masking.seal(sk2, own.boxes, i, VICTIM, filler[0], filler[0])
        for i, (_, sk2, _) in forged.items()
    }
    masked = victim.open(sealed, terms_of).masked(server.vectors[VICTIM].copy())
    found = masked - masking.mask(seed, LENGTH, BITS)
    return _right(server, found - _pairs(private, shown, told().digest()))


def _pairs(private: bytes, keys: Mapping[int, RoundKeys], digest: bytes) -> Words:
    """All that the victim's masks towards the others add."""
    total = np.zeros(LENGTH, dtype=masking.words(BITS))
    for i, k in keys.items():
        if i != VICTIM:
            shared = masking.pair_mask(private, k.masks, digest, LENGTH, BITS)
            masking.cancel(total, VICTIM, i, shared)
    return total


def _right(server: Server, found: Words) -> bool:
    return np.array_equal(found, server.vectors[VICTIM])
