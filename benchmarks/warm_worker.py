"""Time from a node's message to its first training step, with and without the warm worker.

    python benchmarks/warm_worker.py [experiment.toml] [--repeat 3]

Flower starts a new process for every message. This does the same, three ways: the process that
imports and loads everything itself; the one that hands the message to a worker that has just
started; and to a worker that has seen a message before. Counted from the start of the process to
the first step (reply's arrival less the time that training took). Flower's own polling (up to 3 s
at the node, 0.2 s at its executor) comes on top, alike in all three.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def build(experiment: str, target: Path) -> None:
    """One train message and its context, as a node would receive them."""
    from client_app.app import app
    from fedlora.federation.client.dispatch import pack
    from fedlora.federation.server.loop import FederatedLora
    from fedlora.federation.server.run import client, message
    from fedlora.launch.experiment_file import load
    from fedlora.launch.simulate.grid import LocalGrid
    from fedlora.strategies.base import Round
    from fedlora.training.quiet import quiet_libraries

    quiet_libraries()
    given = {"run.out": str(target), "evaluate.clients": False, "evaluate.baselines": False,
             "evaluate.every": 0, "train.steps": 4}  # fmt: skip
    config = load(experiment, given)
    with LocalGrid(app, config.clients.count, config.flat(), 1) as grid:
        server = FederatedLora(config)
        server.begin(grid)
        values = server.setting, server.session, server.run
        first = client(server.setting, server.run, 0)
        sent = message(*values, first, Round(1, config.run.seed), "train")
        context = grid.contexts[sent.metadata.dst_node_id]
        sent.metadata.__dict__["_message_id"] = "0" * 32
        context.node_config["memory"] = str(target / "memory")
        (target / "message").write_bytes(pack("train", sent, context))


CHILD = """
import sys
from fedlora.federation.client.dispatch import unpack
from flwr.supercore.task_identity import TaskIdentity
import flwr.supernode.runtime.run_clientapp  # what Flower's own process imports
kind, message, context = unpack(open(sys.argv[1], "rb").read())
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, context.run_id, context.node_id
from client_app.app import app
reply = app(message, context)
assert not reply.has_error(), reply.error.reason
print(reply.content.metric_records["metrics"]["train-seconds"], "torch" in sys.modules)
"""


def once(message: Path, socket: str = "") -> float:
    """Seconds from the start of a client's process to its first step."""
    begun = time.perf_counter()
    env = {**os.environ, "FEDLORA_WORKER_SOCKET": socket}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(message)], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    said = done.stdout.split()
    assert (said[1] == "True") == (not socket), "only the process without a worker imports torch"
    return time.perf_counter() - begun - float(said[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", nargs="?", default="simulations/experiments/quickstart.toml")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fl") as name:
        target = Path(name)
        build(given.experiment, target)
        message, socket = target / "message", target / "worker.sock"
        cold = [once(message) for _ in range(given.repeat)]
        worker = subprocess.Popen(
            [sys.executable, "-m", "fedlora.launch.deploy.worker", "--socket", str(socket)]
        )
        try:
            while not socket.exists():
                time.sleep(0.05)
            first = once(message, str(socket))
            warm = [once(message, str(socket)) for _ in range(given.repeat)]
        finally:
            worker.terminate()
            worker.wait()
    found = {"without": cold, "worker just started": [first], "warm worker": warm}
    print(json.dumps({k: [round(s, 2) for s in v] for k, v in found.items()}))
    print("load average", os.getloadavg())


if __name__ == "__main__":
    main()
