"""`fedlora node`: what a node's operator asks of the node's own policy and record."""

import json
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.launch.node_backup import backup, restore
from fedlora.launch.node_file import NodeFile
from fedlora.launch.node_ledger_cli import recover
from fedlora.launch.node_members_cli import members

if TYPE_CHECKING:
    from fedlora.config.policy import Policy
    from fedlora.config.reader import Config

app = typer.Typer(help="A node's own policy, node.toml, and its record.", no_args_is_help=True)
app.command()(recover)
app.command()(backup)
app.command()(restore)
app.add_typer(members, name="members")


@app.callback()
def own() -> None:
    """A node's own policy, node.toml, and its record."""


@app.command()
def keeper(
    policy: NodeFile,
    user: Annotated[
        list[str],
        typer.Option(help="A user, by name or number, whose processes may ask; repeatable."),
    ],
) -> None:
    """Keep the node's ledger and record, under a user of its own, until it is ended."""
    from fedlora.errors import DeployError

    if not hasattr(socket, "SO_PEERCRED"):
        text = f"a keeper needs Unix sockets that say whose they are, which {sys.platform} has not"
        raise DeployError(f"{text}: run the node on Linux")
    from fedlora.launch.node_keeper import keep

    keep(policy, user)


@app.command()
def check(
    policy: NodeFile,
    run: Annotated[Path, typer.Argument(help="A run: an experiment's file or name, or the "
                                             "config.toml of a run's directory.",
                                        show_default=False)],
) -> None:  # fmt: skip
    """What of a run this node would refuse, and why; fails where it would refuse any."""
    from fedlora.config.policy import Policy
    from fedlora.launch.experiment_file import load

    read = Policy.load(policy)
    found = refusals(read, load(run))
    for reason in found:
        typer.echo(f"refused: {reason}")
    if found:
        raise typer.Exit(1)
    typer.echo(f"{policy} allows {run}")


def refusals(policy: "Policy", config: "Config") -> list[str]:
    """Why the node would not take part in a run of this config; nothing where it would."""
    from fedlora import preflight
    from fedlora.errors import ConfigError, PolicyError
    from fedlora.federation.client.admit import admit
    from fedlora.federation.wire.job import Job

    job = Job(1, "check", "check", 0, {"a module": _highest(policy, config)}, 0, 0, "", ())
    needs, found = config.build_strategy().needs(), list[str]()
    kinds = {
        "query": True,
        "train": not config.secure.aggregation,
        "secagg": config.secure.aggregation,
        "evaluate": config.evaluate.clients,
        "gradient": bool(needs.first_gradient) or config.lora.by_gradient,
        "collect": needs.collect_at_end,
    }
    missing = [kind for kind, asked in kinds.items() if asked and kind not in policy.limits.kinds]
    found += [f"messages of kind {kind}: not in limits.kinds" for kind in missing]
    try:
        found += preflight.problems(admit(policy, config.flat(), job))
    except PolicyError as e:
        found += e.reasons
    except ConfigError as e:
        found += e.problems
    return found


def _highest(policy: "Policy", config: "Config") -> int:
    """The highest rank that this node may be asked for, in any module and round."""
    from fedlora.federation.server.ranks import GROWTH, parse_pattern

    whole = bool(config.build_strategy().needs().client_choice)  # it is sent all ranks
    rank = 0 if whole else policy.model.rank
    rank = rank or max(config.clients.ranks)
    rank *= GROWTH if config.ranks.policy == "adaptive" else 1
    return max(rank, *(r for _, r in parse_pattern(config.lora.rank_pattern).values()), 0)


@app.command()
def init(policy: NodeFile) -> None:
    """Make this node's keys, here. Only their public halves are for others."""
    from fedlora.errors import DeployError
    from fedlora.launch.deploy import keys

    place = policy.absolute().parent
    if not place.is_dir():
        raise DeployError(f"{place} is no directory: name the node.toml of this node")
    made = keys.own_keys(place)
    if "member" in made and policy.exists():
        _first_book(policy)
    for name, whose in (
        ("node", "the server's operator, who registers it: flwr supernode register"),
        ("member", "the operators of the other nodes, not by way of the server: "
                   "fedlora node members add"),
    ):  # fmt: skip
        state = "is new" if name in made else "was there"
        typer.echo(f"{place / name}.pub {state}; it is for {whose}")
    typer.echo(f"{place / 'node.key'} and {place / 'member.key'} stay on this machine")


def _first_book(policy: Path) -> None:
    """Of a node whose key is new: where it has no count of secure rounds, its disk may be new."""
    from fedlora.config.policy import Policy
    from fedlora.federation.client.secure_book import SecureBook

    read = Policy.load(policy)
    book = SecureBook(read.ledger)
    if not read.privacy.keeper and not book.path.exists():
        book.recover(0)


@app.command()
def rotate(policy: NodeFile) -> None:
    """Make the node a new key, and say what the server's operator does with it."""
    from fedlora.launch.deploy import keys

    place = policy.absolute().parent
    keys.rotate(place)
    typer.echo(f"{place / 'node.pub'} is new; old.key and old.pub are what was.")
    typer.echo("On one host `fedlora deploy up DIR` does the rest. Else the server's operator:")
    typer.echo("  flwr supernode register node.pub fedlora --name NAME")
    typer.echo(
        "  flwr supernode unregister ID fedlora        # the old key's; deploy status has it"
    )
    typer.echo("Then, here: end the node, which starts again with its new key; rm old.key old.pub")


@app.command()
def audit(
    policy: NodeFile,
    last: Annotated[int, typer.Option("-n", help="How many of the last lines; 0: all.")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="The lines as they are.")] = False,
) -> None:
    """What this node was asked, what it refused, and all that left it."""
    from fedlora.config.policy import Policy
    from fedlora.federation.client.audit import read

    book = Policy.load(policy).audit
    lines = [*read(book)]
    for line in lines[-last:] if last else lines:
        typer.echo(json.dumps(line) if as_json else told(line))
    if not as_json:
        left = [x for x in lines if x.get("what") == "left"]
        refused = sum(x.get("what") in ("refused", "failed") for x in lines)
        sent = sum(n for x in left if type(n := x.get("bytes")) is int)
        typer.echo(
            f"{book}: {len(left)} replies left, {sent} bytes; {refused} refused or failed; "
            f"{_open(lines)} without an end: lost with their process, or under way"
        )


def _open(lines: "list[Mapping[str, Any]]") -> int:
    """How many messages were asked of which no line says what became of them."""
    asked, ended = Counter[str](), Counter[str]()
    for x in lines:
        which = str([x.get(key) for key in ("kind", "run", "round")])
        (asked if x.get("what") == "asked" else ended)[which] += 1
    return (asked - ended).total()


def told(line: object) -> str:
    """A line of the record in words."""
    from fedlora.federation.wire.codes import cleaned

    x = line if isinstance(line, dict) else {}
    parts = [str(x.get("time", "?")), str(x.get("what", "?")), str(x.get("kind", ""))]
    for key in ("run", "round", "bytes", "epsilon", "policy", "error"):
        parts += [f"{key} {x[key]}"] if key in x else []
    for between, key in ((", ", "records"), ("; ", "reasons")):
        parts += [between.join(map(str, x[key]))] if isinstance(x.get(key), list) else []
    return "  ".join(cleaned(part) for part in parts if part)
