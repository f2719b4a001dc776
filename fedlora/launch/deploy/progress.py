"""Prints the state of a deployment: its processes, nodes, runs and logs."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fedlora.errors import DeployError
from fedlora.launch.deploy.host import healthy, resuming, said
from fedlora.launch.deploy.log_lines import harmless
from fedlora.launch.deploy.operator import Operator
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.registering import registered
from fedlora.launch.deploy.supervise import is_running, read_state
from fedlora.launch.deploy.watch import ServerWatch

ONE_USER = (
    "All of them run as one user, who can read each node's key and change its node.sh, its policy, "
    "its ledger and its record: a trial. "
    "Elsewhere each node has a machine, or a user, of its own."
)


def tables(plan: Plan) -> Iterator[Table]:
    """Processes; and where the SuperLink answers, nodes and the latest runs."""
    yield processes(plan)
    if healthy(plan):
        with Operator(plan) as operator:
            yield nodes(plan, operator.nodes())
            yield runs(operator.runs())


def processes(plan: Plan) -> Table:
    """What the supervisor runs here, and what it will start again."""
    state = read_state(plan)
    table = Table("process", "pid", "state", "restarts", "last exit", title=str(plan.directory))
    everything = {"supervisor": state["supervisor"], **state["children"]} if state else {}
    for name, entry in everything.items():
        if is_running(entry):
            said = "running"
        elif entry.get("next_start"):
            said = f"starts again in {max(0, entry['next_start'] - time.time()):.0f} s"
        else:
            said = "[red]gone[/]" if entry.get("pid") else "not started yet"
        exit_code = entry.get("last_exit")
        table.add_row(
            name,
            str(entry.get("pid") or ""),
            said,
            str(entry.get("restarts", "")),
            "" if exit_code is None else str(exit_code),
        )
    if everything:
        table.caption = ONE_USER
    else:
        table.add_row("", "", f"not up; fedlora deploy up {plan.quoted}", "", "")
    return table


def nodes(plan: Plan, found: list[dict[str, Any]]) -> Table:
    """The registered nodes, since when their keys are known, and whether they are connected."""
    table = Table("node", "rank", "status", "online for", "key of", "node id", title="Nodes")
    ranks = {f"node-{i}": str(plan.rank(i)) for i in range(plan.clients)}
    names = {node_id: name for name, node_id in registered(plan).items()}
    for node in sorted(found, key=lambda n: names.get(str(n["node-id"]), "")):
        name = names.get(str(node["node-id"]), "")
        online = node.get("status") == "online"
        table.add_row(
            name,
            ranks.get(name, ""),
            "[green]online[/]" if online else f"[red]{node.get('status')}[/]",
            f"{float(node.get('online-elapsed') or 0):.0f} s" if online else "",
            str(node.get("created-at", ""))[:10],
            str(node.get("node-id")),
        )
    return table


def runs(found: list[dict[str, Any]], most: int = 5) -> Table:
    table = Table("run", "status", "seconds", "details", title="Runs")
    for run in found[:most]:
        table.add_row(
            run["run-id"], run["status"], f"{float(run['elapsed']):.0f}", run["status-details"]
        )
    return table


def tail(plan: Plan, name: str, lines: int) -> str:
    """The last lines of a process's log."""
    path = plan.run_directory / f"{name}.log"
    try:
        found = path.read_bytes().decode(errors="replace").rstrip("\n").split("\n")
        return "\n".join(map(harmless, found[-lines:]))
    except FileNotFoundError:
        there = ", ".join(sorted(p.stem for p in plan.run_directory.glob("*.log"))) or "none yet"
        raise DeployError(f"no log of {name!r}; there are: {there}") from None


def finish(
    plan: Plan, results: Path, run_id: str, status: str, overrides: Mapping[str, Any]
) -> None:
    """The report and the summary of a run that ended.

    Raises:
        DeployError: it did not complete; with its own error, or where it said none, its last words.
    """
    if status != "finished:completed":
        last = ServerWatch(plan, run_id).error or (
            f"the ServerApp's last words:\n{said(plan, run_id, 25)}"
        )
        raise DeployError(
            f"the run ended as {status}: {last}\nMend the cause, then `{resuming(plan, overrides)}`"
        )
    from fedlora.reports import report

    report.closing(results, report.write(results))
