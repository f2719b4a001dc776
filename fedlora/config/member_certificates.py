"""An authority's word on whose a key is: a member's certificate, in OpenSSH's format.

    authority.key    Ed25519, on a machine of the members' own, never the server's: it signs offline
    authority.pub    on each node's list of members
    member.cert      "client 3 signs with this key, until then"; it travels beside the round's keys

A host certificate whose one principal is `fedlora-client-N`; `ssh-keygen -L -f member.cert` shows
it. So a member that joins is signed once, and no other node's list changes.
"""

import os
import time
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    SSHCertificate,
    SSHCertificateBuilder,
    SSHCertificateType,
    load_ssh_public_identity,
)

from fedlora.errors import PrivacyError

LONGEST = 2000
"""Bytes of a certificate; one has some 500."""
EARLIER = 3600
"""Seconds before it was made from which it holds: clocks differ a little."""


def certify(authority: bytes, client: int, identity: bytes, days: float) -> bytes:
    """The certificate of a client's public key, by the authority's private one (32 bytes each)."""
    now = int(time.time())
    made = (
        SSHCertificateBuilder()
        .public_key(Ed25519PublicKey.from_public_bytes(identity))
        .serial(int.from_bytes(os.urandom(8)))
        .type(SSHCertificateType.HOST)
        .key_id(f"client {client} of fedlora".encode())
        .valid_principals([_principal(client)])
        .valid_after(min(now, now + int(days * 86400)) - EARLIER)
        .valid_before(now + int(days * 86400))
    )
    return made.sign(Ed25519PrivateKey.from_private_bytes(authority)).public_bytes()


def check_certificate(certificate: bytes, client: int, identity: bytes, authority: bytes) -> None:
    """Nothing, where the authority says, and says still, that this is the client's public key.

    Raises:
        PrivacyError: it does not; says in which respect.
    """
    if not certificate:
        raise PrivacyError.public(f"client {client} shows no certificate of its key")
    found = read_certificate(certificate)
    whose = f"client {client}'s certificate"
    if found is None:
        raise PrivacyError.public(f"{whose} is none")
    if _raw(found.signature_key()) != authority:
        raise PrivacyError.public(f"{whose} is of another authority than this node's list has")
    try:
        found.verify_cert_signature()
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        raise PrivacyError.public(f"{whose} is not signed by its authority") from None
    if _raw(found.public_key()) != identity:
        raise PrivacyError.public(f"{whose} is of another key than it shows")
    if found.type != SSHCertificateType.HOST or found.critical_options or (
        found.valid_principals != [_principal(client)]
    ):  # fmt: skip
        raise PrivacyError.public(f"{whose} is of another client, or of another use")
    if not found.valid_after <= time.time() < found.valid_before:
        end = datetime.fromtimestamp(min(found.valid_before, 2**40), UTC)
        raise PrivacyError.public(f"{whose} has expired, or is not valid yet: until {end:%Y-%m-%d}")


def read_certificate(certificate: bytes) -> SSHCertificate | None:
    """None where it is none."""
    if len(certificate) > LONGEST:
        return None
    try:
        found = load_ssh_public_identity(certificate)
        if isinstance(found, SSHCertificate):
            found.signature_key()  # both are read where they are asked for, and no sooner
            found.public_key()
            return found
    except (ValueError, TypeError, UnsupportedAlgorithm):
        pass
    return None


def _raw(key: object) -> bytes:
    return key.public_bytes_raw() if isinstance(key, Ed25519PublicKey) else b""


def read_file(path: Path) -> bytes:
    """A node's own certificate; nothing where it has none."""
    try:
        return path.read_bytes()[: LONGEST + 1].strip()
    except FileNotFoundError:
        return b""


def _principal(client: int) -> bytes:
    return f"fedlora-client-{client}".encode()
