"""`fedlora node backup` and `restore`: a node's keys, policy, members and ledger, in one file.

    own/node.toml, node.key, member.key, ...     what lies beside node.toml
    ledger/ledgers/, known/, secure-rounds.json  what was spent, and the count of secure rounds

Not in it: the memory of runs that are under way, the record, rows and models. The file holds
private keys and is its owner's alone.

Edge cases
    killed while it is written     no file, or the one that was there before
    the node works meanwhile       the ledger's lock is held: one whole state of it is kept
    a ledger is there already      nothing is restored: it may be the newer one
    a key or policy is there, and
    it is another                  nothing is restored
    the backup is older than what
    was spent                      its operator says the rest, `recover`; a run that is under way
                                   refuses by the server's count; else nobody can tell
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from fedlora.launch.node_file import NodeFile

OWN = ("node.toml", "node.key", "node.pub", "member.key", "member.pub", "member.cert",
       "members.toml", "ca.crt")  # fmt: skip
SPENT = re.compile(r"ledger/((ledgers|known)/([\w-][\w.-]*/){0,2}[\w-][\w.-]*|secure-rounds\.json)")
LONGEST = 2**30
"""Bytes of one file of a backup."""
File = Annotated[Path, typer.Argument(help="The backup.", show_default=False)]


def backup(policy: NodeFile, file: File) -> None:
    """Keep the node's keys, policy, list of members and ledger in one file.

    As they are at this moment, while the node works on or not.
    """
    from fedlora.config.policy import Policy
    from fedlora.federation.client.secure_book import SecureBook
    from fedlora.lora.tree_file import appearing
    from fedlora.privacy.ledger import Ledger

    read, home = Policy.load(policy), policy.absolute().parent
    ledger, book = Ledger(read.ledger), SecureBook(read.ledger)
    with ledger.held(), book.held():
        charges = len(ledger.read().charges)  # a damaged one is no backup
        book.read()
        spent = {f"ledger/{p.relative_to(read.ledger).as_posix()}": p for p in _spent(read.ledger)}
        own = {f"own/{name}": home / name for name in OWN if (home / name).is_file()}
        with appearing(file.absolute()) as new, tarfile.open(new, "w:gz") as tar:
            for name, path in {**own, **spent}.items():
                tar.add(path, name, recursive=False)
    typer.echo(f"{file}: {len(own)} files of {home}, and a ledger of {charges} charges")
    for what, named in (("secure.key", read.secure.key), ("secure.members", read.secure.members)):
        if named and Path(named).exists() and Path(named).parent != home:
            typer.echo(f"Not in it: {named} ({what}), which is elsewhere; keep it too")


def restore(policy: NodeFile, file: File) -> None:
    """Put back what `backup` kept, on a disk that has none of it.

    From then on the node takes part in no secure aggregation of a server that was started before.
    """
    from fedlora.config.policy import Policy
    from fedlora.errors import DeployError
    from fedlora.federation.client import audit
    from fedlora.federation.client.secure_book import AHEAD, SecureBook
    from fedlora.privacy.ledger import Ledger

    home, files = policy.absolute().parent, dict(_files(file))
    own = {x.removeprefix("own/"): data for x, data in files.items() if x.startswith("own/")}
    own = {policy.name if name == "node.toml" else name: data for name, data in own.items()}
    if unlike := [x for x in own if (home / x).exists() and (home / x).read_bytes() != own[x]]:
        raise DeployError(
            f"{home / unlike[0]} is there, and is another than that of {file}: move it away first"
        )
    for name, data in own.items():
        _write(home / name, data)
    read = Policy.load(policy)
    if there := [x for x in ("ledgers", "known") if (read.ledger / x).exists()]:
        raise DeployError(
            f"{read.ledger / there[0]} is there, and may be newer than {file}: where it is not, "
            "move it away first"
        )
    _put_back(read.ledger, {k: v for k, v in files.items() if k.startswith("ledger/")})
    found = Ledger(read.ledger).read()
    SecureBook(read.ledger).recover(None)
    audit.append(read.audit, "restored", charges=len(found.charges))
    typer.echo(f"{read.ledger}: a ledger of {len(found.charges)} charges, as the backup has it")
    typer.echo(
        "What was spent since, or how many secure rounds there were, it does not know. Say it:\n"
        "  fedlora node recover node.toml --spent EPSILON --secure-rounds N\n"
        "A run with secure aggregation that is under way goes on here once its server has been "
        f"started again, {AHEAD} s from now or later."
    )


def _spent(root: Path) -> Iterator[Path]:
    """The files of a ledger's directory that say what was spent."""
    for name in ("ledgers", "known"):
        yield from sorted(p for p in (root / name).rglob("*") if p.is_file() and _kept(root, p))
    if (found := root / "secure-rounds.json").exists():
        yield found


def _kept(root: Path, path: Path) -> bool:
    """Neither a lock, nor what a crash left of a file that was being written."""
    within = path.relative_to(root)
    return path.suffix != ".lock" and not any(x.startswith(".") for x in within.parts)


def _files(file: Path) -> Iterator[tuple[str, bytes]]:
    """What a backup holds, by name.

    Raises:
        DeployError: it is none, or holds what no backup does.
    """
    from fedlora.errors import DeployError

    try:
        with tarfile.open(file) as tar:
            for x in tar:
                name = x.name
                plain = name.startswith("own/") and name[4:] in OWN
                if not (x.isreg() and x.size <= LONGEST and (plain or SPENT.fullmatch(name))):
                    raise DeployError(f"{file}: holds {name[:80]!r}, as no backup of a node does")
                found = tar.extractfile(x)
                yield name, (found or io.BytesIO()).read()
    except (OSError, EOFError, tarfile.TarError) as e:
        raise DeployError(f"{file}: is no backup of a node, or is damaged ({e})") from None


def _put_back(root: Path, files: Mapping[str, bytes]) -> None:
    """The ledger's files: all beside their places first, so that none is there alone."""
    beside = root / f".restored-{os.urandom(4).hex()}"
    for name, data in files.items():
        _write(beside / name.removeprefix("ledger/"), data)
    for path in sorted(beside.iterdir() if beside.exists() else ()):
        os.replace(path, root / path.name)
    if beside.exists():
        beside.rmdir()


def _write(path: Path, data: bytes) -> None:
    from fedlora.lora.tree_file import write_atomically

    for directory in (*reversed(path.parents),):
        if not directory.exists():
            directory.mkdir(mode=0o700)
    write_atomically(path, data)
