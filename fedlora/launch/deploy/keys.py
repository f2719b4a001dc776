"""Certificates and node keys.

One authority signs one server certificate; nodes trust the authority alone. Each node signs its
requests with an EC P-384 key of its own, whose public half is registered with the SuperLink; and
what it says in a secure aggregation with an Ed25519 key, whose public half other nodes list. Both
are made on the node, `own_keys`, and only the public halves leave it.
"""

import os
import shutil
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import DeployError

Key = ec.EllipticCurvePrivateKey


def write_private(path: Path, data: bytes) -> None:
    """A file that only its owner can read, from its first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
        f.write(data)


def authority(directory: Path, days: float) -> tuple[Key, x509.Certificate]:
    """ca.key and ca.crt of a new authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora deployment authority")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder(name, name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    write_private(directory / "ca.key", _pem(key))
    (directory / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return key, certificate


def load_authority(directory: Path) -> tuple[Key, x509.Certificate]:
    key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
    assert isinstance(key, Key)
    return key, x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())


def server_certificate(
    directory: Path, ca: tuple[Key, x509.Certificate], hosts: list[str], days: float
) -> None:
    """server.key and server.pem for these names and addresses, the loopback's among them."""
    key = ec.generate_private_key(ec.SECP384R1())
    names = [*dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"])]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    certificate = (
        _builder(subject, ca[1].subject, key, days, ca[0])
        .add_extension(x509.SubjectAlternativeName([_name(n) for n in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca[0], hashes.SHA384())
    )
    write_private(directory / "server.key", _pem(key))
    (directory / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def own_keys(directory: Path) -> list[str]:
    """node.key and member.key with their public halves, where there are none; which were made."""
    made = []
    if not (directory / "node.key").exists():
        node_key(directory)
        made.append("node")
    if not (directory / "member.key").exists():
        _write_pair(directory, "member", Ed25519PrivateKey.generate())
        made.append("member")
    return made


def member_authority(directory: Path) -> None:
    """authority.key and authority.pub, which sign members' keys.

    Raises:
        DeployError: there is one.
    """
    if (directory / "authority.key").exists():
        raise DeployError(f"{directory / 'authority.key'} is there: what it signed would be lost")
    directory.mkdir(parents=True, exist_ok=True)
    _write_pair(directory, "authority", Ed25519PrivateKey.generate())


def node_key(directory: Path, name: str = "node") -> None:
    """node.key, and node.pub in OpenSSH's format, as `flwr supernode register` takes it."""
    _write_pair(directory, name, ec.generate_private_key(ec.SECP384R1()))


def _write_pair(directory: Path, name: str, key: Key | Ed25519PrivateKey) -> None:
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    write_private(directory / f"{name}.key", private)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (directory / f"{name}.pub").write_bytes(public + b"\n")


def rotate(directory: Path) -> None:
    """A new node.key and node.pub; those that were are old.key and old.pub until `forget_old`.

    There is a key at every moment, and the one that the SuperLink knows is never lost: a rotation
    that was cut short goes on the next time, and is under way as long as there is a new.key.

    Raises:
        DeployError: there is no key, or the server has yet to learn of the last rotation.
    """
    if not (directory / "node.key").exists():
        raise DeployError(f"{directory} has no node.key: nothing to rotate")
    if not (directory / "old.key").exists():
        node_key(directory, "new")
        shutil.copy2(directory / "node.pub", directory / "old.pub")
        shutil.copy2(directory / "node.key", directory / "old.part")
        (directory / "old.part").replace(directory / "old.key")
    elif not (directory / "new.key").exists():
        raise DeployError(
            f"{directory / 'old.key'} is there: the last rotation is not finished. Once the new "
            "key is registered and the old one is not, remove old.key and old.pub"
        )
    for kind in ("pub", "key"):
        if (new := directory / f"new.{kind}").exists():
            new.replace(directory / f"node.{kind}")


def forget_old(directory: Path) -> None:
    """End a rotation: the SuperLink knows the new key, and the old one no more."""
    for kind in ("pub", "key"):
        (directory / f"old.{kind}").unlink(missing_ok=True)


def pem(public: Path) -> str:
    """A node.pub as PEM, the form in which the SuperLink keeps it."""
    key = serialization.load_ssh_public_key(public.read_bytes())
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode()


def expiry(certificate: Path) -> datetime:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, days: float, signer: Key | None = None
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    start = min(now, now + timedelta(days=days)) - timedelta(hours=1)  # clocks differ a little
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key((signer or key).public_key()),
            critical=False,
        )
        .not_valid_before(start)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
