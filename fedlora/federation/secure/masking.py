"""Keys, shares, encryption and masks for SecAgg+: Flower's primitives, except for the masks.

    key pairs          ECDH on SECP384R1, HKDF-SHA256           Flower
    shares             Shamir's scheme over 16-byte blocks      Flower (pycryptodome)
    encryption         Fernet, authenticated                    Flower (cryptography)
    masks              AES-256-CTR keyed by the 32 bytes        `privacy.chance` (cryptography)

Flower's `pseudo_rand_gen` is not used for the masks: it folds the 32 bytes into a seed of 32 bits,
of which a shared key, being base64, fills 28, for a Mersenne twister. A server could try them all.
AES in counter mode is the generator that Bonawitz et al. name.
"""

import base64
import hmac
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidKey, UnsupportedAlgorithm
from cryptography.fernet import InvalidToken
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.secaggplus_utils import (
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from fedlora.errors import PrivacyError
from fedlora.privacy.chance import Chance

Words = npt.NDArray[np.unsignedinteger]
"""Integers modulo 2^32 or 2^64; numpy's arithmetic on them is that."""

BAD_KEY = (ValueError, TypeError, AttributeError, InvalidKey, UnsupportedAlgorithm)


def words(bits: int) -> "np.dtype[np.unsignedinteger]":
    return np.dtype("<u4" if bits == 32 else "<u8")


def key_pair() -> tuple[bytes, bytes]:
    """A fresh (private, public) pair."""
    private, public = generate_key_pairs()
    return private_key_to_bytes(private), public_key_to_bytes(public)


def check_public(key: bytes) -> None:
    """Raises PrivacyError where it is not a public key that secrets can be agreed with."""
    private, _ = key_pair()
    _agreed(private, key)


def fresh_seed() -> bytes:
    return os.urandom(32)


def split(secret: bytes, threshold: int, shares: int) -> list[bytes]:
    """Shamir shares of a secret: any `threshold` of them restore it, and fewer reveal nothing."""
    return create_shares(secret, threshold, shares)


def joined(shares: Sequence[bytes]) -> bytes:
    """The secret, restored from its shares.

    Raises:
        PrivacyError: the shares are not of one secret.
    """
    try:
        return combine_shares(list(shares))
    except (ValueError, IndexError) as e:
        raise PrivacyError.public(f"{len(shares)} shares do not make one secret: {e}") from None


def seal(private: bytes, public: bytes, source: int, to: int, seed: bytes, key: bytes) -> bytes:
    """A share of the seed and one of the private key, which only client `to` can read."""
    plain = share_keys_plaintext_concat(source, to, seed, key)
    return encrypt(_agreed(private, public), plain)


def unseal(private: bytes, public: bytes, source: int, to: int, box: bytes) -> tuple[bytes, bytes]:
    """The two shares again.

    Raises:
        PrivacyError: it was changed on the way, or is from or for someone else.
    """
    try:
        found, meant, seed, key = share_keys_plaintext_separate(
            decrypt(_agreed(private, public), box)
        )
    except InvalidToken:
        raise PrivacyError.public(
            f"the shares of client {source} for client {to} do not decrypt"
        ) from None
    if (found, meant) != (source, to):
        raise PrivacyError.public(
            f"shares of client {found} for client {meant} came to client {to} as client {source}'s"
        )
    return seed, key


def mask(seed: bytes, n: int, bits: int) -> Words:
    """n integers that look uniform to anyone without the 32 bytes of the seed."""
    return Chance(seed).words(n, words(bits))


def pair_mask(private: bytes, public: bytes, told: bytes, n: int, bits: int) -> Words:
    """The mask that two clients share, from either's private and the other's public key.

    `told` is the digest of what each was told: of two that differ, the masks do not cancel.
    """
    agreed = base64.urlsafe_b64decode(_agreed(private, public))
    return mask(hmac.digest(agreed, told, "sha256"), n, bits)


def cancel(total: Words, me: int, other: int, shared: Words) -> None:
    """Add a pair's mask in place for one of the two, and subtract it for the other."""
    if me > other:
        np.add(total, shared, out=total)
    else:
        np.subtract(total, shared, out=total)


def _agreed(private: bytes, public: bytes) -> bytes:
    try:
        return generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(public))
    except BAD_KEY as e:
        raise PrivacyError.public(f"not a key of this protocol: {e}") from None
