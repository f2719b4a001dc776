"""What the tests against real processes share: a deployment of tiny models, up."""

import json
import threading
import tomllib
from pathlib import Path
from typing import Any

from fedlora.config.reader import Config
from fedlora.launch.deploy import host
from fedlora.launch.deploy.layout import Wanted, init
from fedlora.launch.deploy.operator import Operator
from fedlora.launch.deploy.plan import Plan

BEHIND = "${PYTHONPATH:+:$PYTHONPATH}"
"""In a shell: what is on the import path already, behind what is put before it; often nothing."""


def prepared(directory: Path, given: dict[str, Any], clients: int, **wanted: Any) -> Plan:
    overrides = {k: v for k, v in given.items() if k not in ("clients.count", "run.out")}
    wanted = {"one_host_trial": True, **wanted}
    return init(Wanted(directory, clients, overrides=overrides, **wanted))


def brought_up(directory: Path, given: dict[str, Any], clients: int, **wanted: Any) -> Plan:
    plan = prepared(directory, given, clients, **wanted)
    bring_up(plan)
    return plan


def bring_up(plan: Plan) -> None:
    """Up; where that fails its processes' last words are printed, and none of them is left."""
    try:
        host.up(plan, print, timeout=300.0)
    except BaseException:
        for log in sorted(plan.run_directory.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-2000:]}")
        host.down(plan, print)
        raise


def supported(plan: Plan) -> None:
    """Have this deployment's server find the modules of tests/support."""
    with (plan.server / "env.sh").open("a") as f:
        f.write(f'export PYTHONPATH="{Path(__file__).parent}{BEHIND}"\n')


def watched(plan: Plan, *beside: Path) -> None:
    """Have each process of a node note what it opens and executes, in its node's audit/.

    beside: directories that lie on their import path, too.
    """
    paths = ":".join(map(str, (Path(__file__).parent / "audited", *beside)))
    for i in range(plan.clients):
        (plan.node(i) / "audit").mkdir()
        with (plan.node(i) / "env.sh").open("a") as f:
            f.write(f'export AUDITED="$PWD/audit" PYTHONPATH="{paths}{BEHIND}"\n')


def mortal(plan: Plan) -> Path:
    """Have this deployment's ServerApp obey a `killing` order; the file to write it to."""
    order = plan.server / "killed.json"
    supported(plan)
    app = plan.app / "server_app" / "app.py"
    planted = (
        f"\nfrom pathlib import Path\n\nfrom killing import obey\n\nobey(Path({str(order)!r}))\n"
    )
    app.write_text(app.read_text() + planted)
    return order


def unruled(plan: Plan) -> None:
    """Have its nodes name no policy: a run's noise that can be drawn again passes none."""
    for i in range(plan.clients):
        script = plan.node(i) / "node.sh"
        text = script.read_text()
        ruled = 'policy=\\"$PWD/node.toml\\"'
        assert text.count(ruled) == 1
        script.write_text(text.replace(ruled, 'memory=\\"$PWD/memory\\"'))


def ran(plan: Plan, overrides: dict[str, Any] | None = None, during=None) -> tuple[str, Path]:
    """Run to the end; the status and the results. `during(directory)` is called all the while."""
    with Operator(plan) as operator:
        run_id, results = host.start_run(plan, operator, overrides or {})
        over = threading.Event()

        def strike() -> None:
            while during is not None and not over.wait(0.5):
                during(results)

        beside = threading.Thread(target=strike)
        beside.start()
        try:
            status = host.follow(operator, run_id, results, print)
        finally:
            over.set()
            beside.join()
    if status != "finished:completed":
        print(host.said(plan, run_id, 60))
    return status, results


def experiment(plan: Plan) -> dict[str, Any]:
    """The run config that the deployment sends."""
    tree = tomllib.loads((plan.app / "pyproject.toml").read_text())
    return Config.read(tree["tool"]["flwr"]["app"]["config"]).flat()


def simulated(plan: Plan, out: Path) -> Path:
    """The same experiment on LocalGrid, in this process; its directory."""
    from client_app.app import app
    from fedlora.launch.federation import Federation
    from fedlora.launch.simulate.grid import LocalGrid

    config = Config.read({**experiment(plan), "run.out": str(out), "run.name": "local"})
    with LocalGrid(app, config.clients.count, config.flat(), 1) as grid:
        Federation(config).start(grid)  # as the ServerApp: its messages carry the defaults
    return out / "local"


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def rounds(run: Path) -> list[dict[str, Any]]:
    path = run / "rounds.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
