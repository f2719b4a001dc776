"""Whose signatures a node believes in a secure aggregation: members.toml, named by its node.toml.

    authority = "ssh-ed25519 AAAA..."     whose certificates are believed, where there is one
    revoked = ["ssh-ed25519 AAAA..."]

    [members]
    0 = "ssh-ed25519 AAAA..."       client 0's public key, the member.pub of its node
    1 = "ssh-ed25519 AAAA..."

The keys come from the members' operators, and never from the server. `fedlora node members` adds to
the list and revokes; a revoked key stays on it, so that it is not taken in again. Of a client whose
key is not listed the authority's certificate is believed (member_certificates.py). It may come by
way of the server, which cannot make one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedlora.config.member_certificates import check_certificate
from fedlora.config.toml_file import read_toml
from fedlora.errors import NodeFileError, PrivacyError

KIND = "ssh-ed25519"


@dataclass(frozen=True, slots=True)
class Members:
    """Public keys of 32 bytes, by client.

    Without a list the server says whose each key is, and is believed.
    """

    listed: Mapping[int, bytes] | None = None
    revoked: frozenset[bytes] = field(default_factory=frozenset)
    authority: bytes | None = None

    def check(self, client: int, identity: bytes, certificate: bytes = b"") -> None:
        """Raises PrivacyError where this is not the key that the client is known by.

        That which is listed for it, whatever certificate it shows; else one that the authority says
        is its own.
        """
        if identity in self.revoked:
            raise PrivacyError.public(f"client {client}'s key is revoked on this node")
        if self.listed is None:
            return
        if client not in self.listed and self.authority is not None:
            if identity in self.listed.values():
                raise PrivacyError.public(f"client {client} shows a key that is another client's")
            check_certificate(certificate, client, identity, self.authority)
            return
        if client not in self.listed:
            raise PrivacyError.public(f"client {client} is no member on this node's list")
        if self.listed[client] != identity:
            raise PrivacyError.public(
                f"client {client} shows another key than this node's list has for it"
            )

    @classmethod
    def load(cls, path: Path) -> "Members":
        """The list of a file.

        Raises:
            NodeFileError: it is not there, or is no list of keys; or a key stands there twice.
        """
        tree, _ = read_toml(path)
        where = f"Fix {path}, this node's list of members."
        try:
            strange = tree.keys() - {"members", "revoked", "authority"}
            if strange:
                raise ValueError(f"{min(strange)}: no such key")
            listed = {_client(i): public_key(x) for i, x in tree.get("members", {}).items()}
            revoked = frozenset(public_key(x) for x in tree.get("revoked", []))
            authority = public_key(tree["authority"]) if "authority" in tree else None
        except (ValueError, TypeError, AttributeError) as e:
            raise NodeFileError([f"members: {e}"], where) from None
        if len({*listed.values()}) != len(listed):
            raise NodeFileError(["members: two clients have one key"], where)
        return cls(listed, revoked, authority)

    def save(self, path: Path) -> None:
        """Write the list, whole or not at all."""
        listed = {str(i): key_text(x) for i, x in sorted((self.listed or {}).items())}
        tree: dict[str, Any] = {"authority": key_text(self.authority)} if self.authority else {}
        tree |= {"revoked": sorted(map(key_text, self.revoked)), "members": listed}
        part = path.with_name(f"{path.name}.part")
        part.write_text(tomli_w.dumps(tree))
        part.replace(path)

    def adding(self, client: int, identity: bytes) -> "Members":
        """With one member more.

        Raises:
            NodeFileError: its key is revoked, or another client's, or the client has another key.
        """
        listed = self.listed or {}
        if identity in self.revoked:
            raise NodeFileError([f"client {client}: this key is revoked; make another"])
        if listed.get(client, identity) != identity:
            raise NodeFileError([f"client {client} has another key: revoke that first"])
        if others := [i for i, x in listed.items() if x == identity and i != client]:
            raise NodeFileError([f"client {client}: this is client {others[0]}'s key"])
        return replace(self, listed={**listed, client: identity})

    def revoking_key(self, identity: bytes) -> "Members":
        """Without a key, whoever's it is and whatever certificate it has."""
        listed = {i: x for i, x in (self.listed or {}).items() if x != identity}
        return replace(self, listed=listed, revoked=self.revoked | {identity})

    def revoking(self, client: int) -> "Members":
        """Without a member, whose key is never believed again.

        Raises:
            NodeFileError: there is no such member.
        """
        listed = dict(self.listed or {})
        if client not in listed:
            raise NodeFileError([f"client {client} is no member"])
        key = listed.pop(client)
        return replace(self, listed=listed, revoked=self.revoked | {key})


def public_key(text: str) -> bytes:
    """The 32 bytes of a key in OpenSSH's format; raises ValueError where it is none."""
    try:
        found = serialization.load_ssh_public_key(str(text).strip().encode())
    except (ValueError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PublicKey):
        raise ValueError(f"{str(text)[:40]!r} is no {KIND} key")
    return found.public_bytes_raw()


def key_text(identity: bytes) -> str:
    """The inverse."""
    key = Ed25519PublicKey.from_public_bytes(identity)
    form = serialization.PublicFormat.OpenSSH
    return key.public_bytes(serialization.Encoding.OpenSSH, form).decode()


def private_key(path: Path) -> bytes:
    """The 32 bytes of a node's member.key.

    Raises:
        PrivacyError: there is none, or it is no such key.
    """
    try:
        found = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PrivateKey):
        raise PrivacyError.public(
            "this node has no key to sign with (secure.key of its node.toml); `fedlora node init` "
            "makes one"
        )
    return found.private_bytes_raw()


def _client(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text[:40]!r} is no client's number")
    return int(text)
