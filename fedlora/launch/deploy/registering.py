"""Which nodes the SuperLink knows: their keys are registered, exchanged, and taken off its list."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fedlora.launch.deploy.keys import forget_old, pem
from fedlora.launch.deploy.operator import Operator
from fedlora.launch.deploy.plan import CONNECTION, Plan
from fedlora.launch.deploy.supervise import end, is_running, read_state


def register(plan: Plan, operator: Operator, only: Sequence[int] | None = None) -> None:
    """Make the keys of all nodes, or of these alone, known to the SuperLink, once.

    A deployment without keys has nothing to register: its nodes are whoever connects. A key that
    is there already, since an `up` was cut short, keeps its id.
    """
    ids, part = registered(plan), registered_file(plan).with_suffix(".part")
    part.write_text(json.dumps(ids))
    known = operator.keys() if plan.secure else {}
    for i in (range(plan.clients) if only is None else only) if plan.secure else ():
        key, name = plan.node(i) / "node.pub", f"node-{i}"
        if not (there := known.get(pem(key))):
            answer = operator("supernode", "register", str(key), CONNECTION, "--name", name)
            there = str(answer["node-id"])
        ids[name] = there
        part.write_text(json.dumps(ids))
    save(plan, ids)


def take_new_keys(plan: Plan, operator: Operator, say: Callable[[str], None]) -> None:
    """Register the keys of nodes that were rotated, unregister the old ones, restart the nodes."""
    old = [i for i in range(plan.clients) if (plan.node(i) / "old.pub").exists()]
    rotated = [i for i in old if not (plan.node(i) / "new.key").exists()]
    if not rotated:
        return
    register(plan, operator, rotated)  # and none that was taken off the list
    known = operator.keys()
    for i in rotated:
        if gone := known.get(pem(plan.node(i) / "old.pub")):
            operator("supernode", "unregister", gone, CONNECTION)
        running = read_state(plan).get("children", {}).get(f"node-{i}", {})
        if is_running(running):
            end([running["pid"]])
        forget_old(plan.node(i))
        new = f"node-{i} has a new key; the old one is registered no more"
        say(f"{new}. It is back in a minute or so")


def registered(plan: Plan) -> dict[str, str]:
    """Node name to Flower's id, of those whose keys the SuperLink has."""
    for path in (registered_file(plan), registered_file(plan).with_suffix(".part")):
        with suppress(FileNotFoundError, ValueError):  # cut short: the SuperLink knows the keys
            return dict(json.loads(path.read_text()))
    return {}


def registered_file(plan: Plan) -> Path:
    return plan.run_directory / "registered.json"


def revoked(plan: Plan, operator: Operator) -> list[str]:
    """The nodes that were registered and are no more: somebody took them off the list.

    One whose key was registered anew, by hand, is there again under its new id.
    """
    ids, known = registered(plan), operator.keys() if plan.secure else {}
    here = {n: known.get(pem(plan.node(int(n[5:])) / "node.pub"), "") for n in ids}
    if again := {n: there for n, there in here.items() if there and there != ids[n]}:
        save(plan, {**ids, **again})
    return sorted(n for n, there in here.items() if not there)


def save(plan: Plan, ids: dict[str, str]) -> None:
    """Whole, or as it was: nodes start once it is there."""
    part = registered_file(plan).with_suffix(".part")
    part.write_text(json.dumps(ids))
    part.replace(registered_file(plan))
