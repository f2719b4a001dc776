"""What members sign. Whose signature is believed: config/members.py.

    keys       "these are my keys of this round, and this is the agreement I was shown"
    survivors  "I take part in unmasking the sum over these clients, and over no others"

Ed25519 (RFC 8032), by the `cryptography` package. A signed text is JSON that begins with the name
of the protocol, its version and which of the two it is, so that none stands for another.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PROTOCOL = 4
"""Raised with every change of a message, of what is signed, or of how masks are derived."""
HEAD = ("fedlora secure aggregation", PROTOCOL)


class RoundKeys(NamedTuple):
    """What a member shows the others for one round."""

    masks: bytes
    """Public, of the pair masks."""
    boxes: bytes
    """Public, of the encrypted shares."""
    identity: bytes
    """Public, 32 bytes: whose signature it is."""
    signature: bytes
    certificate: bytes = b""
    """An authority's word on the identity, where there is one: config/member_certificates.py."""


def new_identity() -> bytes:
    """A fresh private key, 32 bytes."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


def public_half(identity: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(identity).public_key().public_bytes_raw()


def sign(identity: bytes, text: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(identity).sign(text)


def signed_by(public: bytes, signature: bytes, text: bytes) -> bool:
    """Is it this key's signature under this text?"""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, text)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def keys_text(run: str, incarnation: str, round: int, client: int,
              masks: bytes, boxes: bytes, agreed: bytes) -> bytes:  # fmt: skip
    """What a member signs beside its keys. `agreed` is the agreement's digest."""
    said = [run, incarnation, round, client, masks.hex(), boxes.hex(), agreed.hex()]
    return json.dumps([*HEAD, "keys", *said]).encode()


def survivors_text(run: str, incarnation: str, round: int, agreed: bytes,
                   survivors: Iterable[int]) -> bytes:  # fmt: skip
    """What each of the clients of a sum signs before any gives its shares."""
    said = [run, incarnation, round, agreed.hex(), sorted(survivors)]
    return json.dumps([*HEAD, "survivors", *said]).encode()
