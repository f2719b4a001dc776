"""`fedlora node members`: whose signatures a node believes in a secure aggregation."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.launch.node_file import NodeFile

if TYPE_CHECKING:
    from fedlora.config.members import Members

members = typer.Typer(help="Whose signatures this node believes in a sum.", no_args_is_help=True)
Number = Annotated[int, typer.Argument(help="The client's number.", min=0, show_default=False)]


@members.callback()
def believed() -> None:
    """Whose signatures this node believes in a secure aggregation."""


@members.command("add")
def add_member(
    policy: NodeFile,
    client: Number,
    public: Annotated[Path, typer.Argument(help="Its member.pub, or its member.cert of the "
                                                "authority that the list names.",
                                           show_default=False)],
) -> None:  # fmt: skip
    """Put a client's public key on the list."""
    from fedlora.config.member_certificates import check_certificate
    from fedlora.errors import NodeFileError

    path, known = _list(policy)
    key, certificate = _key(public)
    if certificate:
        if known.authority is None:
            raise NodeFileError(
                [f"{path} names no authority, so no certificate is believed"], TRUST
            )
        check_certificate(certificate, client, key, known.authority)
    known.adding(client, key).save(path)
    typer.echo(f"{path}: client {client} is a member")


@members.command("revoke")
def revoke_member(
    policy: NodeFile,
    who: Annotated[str, typer.Argument(help="The number of a client that is listed, or the file "
                                            "of a key or certificate.", show_default=False)],
) -> None:  # fmt: skip
    """Take a client's key off the list, and never believe it again, whoever signed it."""
    path, known = _list(policy)
    if who.isdecimal():
        known.revoking(int(who)).save(path)
        typer.echo(f"{path}: client {who} is no member any more, and its key is revoked")
    else:
        known.revoking_key(_key(Path(who))[0]).save(path)
        typer.echo(f"{path}: the key of {who} is revoked")


@members.command("list")
def list_members(policy: NodeFile) -> None:
    """The members and their public keys, the authority, and those that are revoked."""
    from fedlora.config.members import key_text

    _, found = _list(policy)
    if found.authority:
        typer.echo(f"authority  {key_text(found.authority)}")
    for i, key in sorted((found.listed or {}).items()):
        typer.echo(f"{i}  {key_text(key)}")
    for text in sorted(map(key_text, found.revoked)):
        typer.echo(f"revoked  {text}")


@members.command("trust")
def trust_authority(
    policy: NodeFile,
    public: Annotated[Path, typer.Argument(help="Its authority.pub.", show_default=False)],
) -> None:
    """Believe the certificates of an authority, in place of a list of every member's key."""
    from dataclasses import replace

    from fedlora.errors import NodeFileError

    path, known = _list(policy)
    key, certificate = _key(public)
    if certificate:
        raise NodeFileError([f"{public} is a certificate, and no public key"])
    if known.authority not in (None, key):
        raise NodeFileError(
            [f"{path} names another authority"],
            "Take its line out first: all that it signed is believed no more.",
        )
    replace(known, authority=key, listed=known.listed or {}).save(path)
    typer.echo(f"{path}: certificates of this authority are believed")


@members.command("authority")
def make_authority(
    directory: Annotated[Path, typer.Argument(help="Where authority.key and authority.pub go; not "
                                                   "on the server.", show_default=False)],
) -> None:  # fmt: skip
    """Make an authority that signs members' keys, on a machine of the members' own."""
    from fedlora.launch.deploy import keys

    keys.member_authority(directory)
    typer.echo(f"{directory / 'authority.pub'} is for every node: fedlora node members trust")
    typer.echo(f"{directory / 'authority.key'} signs members; whoever has it can be any of them")


@members.command("sign")
def sign_member(
    authority: Annotated[Path, typer.Argument(help="The authority.key.", show_default=False)],
    client: Number,
    public: Annotated[Path, typer.Argument(help="Its member.pub.", show_default=False)],
    days: Annotated[float, typer.Option(help="How long it is believed.", min=0.0)] = 365.0,
) -> None:
    """Sign that a public key is a client's: member.cert, beside its member.pub."""
    from fedlora.config.member_certificates import certify
    from fedlora.config.members import private_key
    from fedlora.errors import NodeFileError
    from fedlora.lora.tree_file import write_atomically

    key, certificate = _key(public)
    if certificate:
        raise NodeFileError([f"{public} is a certificate, and no public key"])
    made = public.with_suffix(".cert")
    write_atomically(made, certify(private_key(authority), client, key, days) + b"\n")
    typer.echo(f"{made}: client {client} signs with this key, for {days:g} days")
    typer.echo("It goes beside the node's member.key; nobody else needs it.")


TRUST = "First: fedlora node members trust node.toml authority.pub"


def _key(path: Path) -> tuple[bytes, bytes]:
    """The public key of a file, and the file where it is a certificate.

    Raises:
        NodeFileError: it is neither.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from fedlora.config.member_certificates import read_certificate
    from fedlora.config.members import public_key
    from fedlora.errors import NodeFileError

    try:
        text = path.read_text()
        if found := read_certificate(text.encode()):
            key = found.public_key()
            if isinstance(key, Ed25519PublicKey):
                return key.public_bytes_raw(), text.strip().encode()
        return public_key(text), b""
    except (OSError, ValueError) as e:
        raise NodeFileError([f"{path}: {e}"], "Name the member.pub of a node.") from None


def _list(policy: Path) -> tuple[Path, "Members"]:
    """Where a node's list of members is, and the list; an empty one where there is none yet."""
    from fedlora.config.members import Members
    from fedlora.config.policy import Policy
    from fedlora.errors import NodeFileError

    if name := Policy.load(policy).secure.members:
        path = Path(name)
        return path, Members.load(path) if path.exists() else Members({})
    raise NodeFileError(
        ["secure.members: is not set, so the server says whose each key is"],
        f'Set members = "members.toml" under [secure] of {policy}.',
    )
