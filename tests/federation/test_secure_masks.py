"""The masks are those that docs/privacy/secure-aggregation.md writes down, step by step."""

import hashlib
import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.supercore.primitives.asymmetric import private_key_to_bytes, public_key_to_bytes

from fedlora.errors import PrivacyError
from fedlora.federation.secure import masking
from tests.support.doc_tables import DOCS, table

SAID = {
    row["step"]: row["value"].strip("`")
    for row in table(DOCS / "privacy" / "secure-aggregation.md", "step")
}
A, B = (
    ec.derive_private_key(int.from_bytes(hashlib.sha256(x).digest(), "big"), ec.SECP384R1())
    for x in (b"a", b"b")
)
DIGEST = hashlib.sha256(b"agreement").digest()


def blocks(key: bytes, n: int) -> bytes:
    """n bytes of AES-256 in counter mode from 0, a block at a time."""
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return b"".join(cipher.update(i.to_bytes(16, "big")) for i in range(-(-n // 16)))[:n]


def test_every_step_of_the_vector_follows_from_the_one_before() -> None:
    shared = A.exchange(ec.ECDH(), B.public_key())
    agreed = hmac.digest(hmac.digest(bytes(32), shared, "sha256"), b"\x01", "sha256")  # HKDF
    key = hmac.digest(agreed, DIGEST, "sha256")
    found = [shared.hex(), agreed.hex(), DIGEST.hex(), key.hex()]
    assert found == [SAID[x] for x in ("ECDH", "agreed key", "digest", "key of the mask")]
    for bits, size, n in ((32, 4, 6), (64, 8, 3)):
        words = np.frombuffer(blocks(key, size * n), dtype=f"<u{size}").tolist()
        assert " ".join(map(str, words)) == SAID[f"first words of {bits} bits"]


@pytest.mark.parametrize(("me", "other"), [(A, B), (B, A)])
@pytest.mark.parametrize("bits", [32, 64])
def test_our_masks_are_those_of_the_vector(
    me: ec.EllipticCurvePrivateKey, other: ec.EllipticCurvePrivateKey, bits: int
) -> None:
    want = SAID[f"first words of {bits} bits"].split()
    private, public = private_key_to_bytes(me), public_key_to_bytes(other.public_key())
    found = masking.pair_mask(private, public, DIGEST, len(want), bits)
    assert [str(x) for x in found.tolist()] == want


def test_a_mask_of_ones_own_is_drawn_anew_from_the_system_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len({masking.fresh_seed() for _ in range(50)}) == 50
    asked: list[int] = []

    def system(n: int) -> bytes:
        asked.append(n)
        return b"\x05" * n

    monkeypatch.setattr(masking.os, "urandom", system)
    assert masking.fresh_seed() == b"\x05" * 32
    assert asked == [32]


def test_shares_are_taken_from_the_client_that_sealed_them_alone() -> None:
    """A client cannot hand in, under its own key, shares that say they are another's."""
    mine, theirs = masking.key_pair(), masking.key_pair()
    seed, key = b"s" * 33, b"k" * 33
    box = masking.seal(mine[0], theirs[1], 1, 2, seed, key)
    assert masking.unseal(theirs[0], mine[1], 1, 2, box) == (seed, key)
    for source, to in ((3, 2), (1, 3), (2, 1)):
        box = masking.seal(mine[0], theirs[1], source, to, seed, key)
        with pytest.raises(PrivacyError, match=f"shares of client {source} for client {to} came"):
            masking.unseal(theirs[0], mine[1], 1, 2, box)
