"""What a deployed node holds in memory while an adapter of so many MB goes down and up.

    python -m benchmarks.node_memory [--adapter-mb 50 200] [--out FILE]

A real deployment of two nodes (SuperLink, TLS, warm workers, the node's own policy) runs two
rounds of fedavg on a base with as many bytes as the adapter. Meanwhile the proportional set size
(PSS: a page that two processes share counts half for each) of each of a node's processes is read
every 50 ms. Printed by process: the most it had, and what it had before the run; and the most that
all the node's processes had at one time. Linux only.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

EVERY = 0.05
MB = 1e6
NODE = 0
"""The node that is watched: all are alike."""


def written(directory: Path, adapter_mb: float) -> dict[str, Any]:
    """A Llama whose rank-w adapter on q and v has so many MB, rows for it, and the settings.

    Of width w the adapter is LAYERS * 2 * 2 * w * w * 4 bytes.
    """
    from tests.support.echo_server import LAYERS, write
    from tests.support.tiny_federation import quick

    width = round((adapter_mb * MB / (LAYERS * 2 * 2 * 4)) ** 0.5 / 8) * 8
    write(directory, width)
    return {
        **quick("fedavg"), "clients.ranks": str(width), "run.rounds": 2, "train.steps": 1,
        "model.path": str(directory / "model"), "model.task": "causal-lm", "model.pooling": "auto",
        "lora.layers": "", "round.deadline": 900.0,
        "lora.target-modules": "q_proj,v_proj", "data.path": str(directory / "rows.jsonl"),
        "data.prompt": "text", "data.test-size": 10, "data.partition": "iid",
        "evaluate.baselines": False, "evaluate.clients": False, "output.plots": False,
    }  # fmt: skip


def pss(pid: int) -> int:
    """Bytes; 0 where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("Pss:")), 0)


class Watch(threading.Thread):
    """Reads the PSS of a node's processes until `over` is set."""

    def __init__(self, plan: Any) -> None:
        super().__init__(daemon=True)
        self.plan, self.over = plan, threading.Event()
        self.most: dict[str, int] = defaultdict(int)
        self.first: dict[str, int] = {}
        self.whole = 0
        self.at_most: dict[str, int] = {}

    def roles(self) -> dict[int, str]:
        """The node's processes, by what each is."""
        from fedlora.launch.deploy.supervise import read_state

        found = {}
        for name, entry in read_state(self.plan)["children"].items():
            kind, _, n = name.rpartition("-")
            if n != str(NODE):
                continue
            try:
                process = psutil.Process(entry["pid"])
                found[process.pid] = kind
                for child in process.children(recursive=True):
                    words = " ".join(child.cmdline())
                    found[child.pid] = "message" if "message_process" in words else kind
            except psutil.Error:
                continue
        return found

    def run(self) -> None:
        while not self.over.wait(EVERY):
            now: dict[str, int] = defaultdict(int)
            for pid, role in self.roles().items():
                now[role] += pss(pid)
            if not self.first:
                self.first = dict(now)
            for role, size in now.items():
                self.most[role] = max(self.most[role], size)
            if (total := sum(now.values())) > self.whole:
                self.whole, self.at_most = total, dict(now)


def measured(adapter_mb: float) -> dict[str, Any]:
    """MB by process."""
    from fedlora.launch.deploy import host
    from tests.support.deployment import brought_up, ran, rounds

    with tempfile.TemporaryDirectory() as at:
        directory = Path(at)
        settings = written(directory, adapter_mb)
        ranks = (int(settings["clients.ranks"]),)
        plan = brought_up(directory / "dep", settings, 2, ranks=ranks)
        try:
            time.sleep(5)
            watch = Watch(plan)
            watch.start()
            status, results = ran(plan)
            watch.over.set()
            watch.join()
            sent = rounds(results)[-1]["bytes"]["up"] / 2 / MB
        finally:
            host.down(plan, lambda _: None)
    assert status == "finished:completed", status
    in_mb = lambda sizes: {k: round(v / MB) for k, v in sorted(sizes.items())}  # noqa: E731
    return {
        "adapter": round(sent), "whole": round(watch.whole / MB), "most": in_mb(watch.most),
        "before": in_mb(watch.first), "at the most": in_mb(watch.at_most),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter-mb", type=float, nargs="+", default=[50.0, 200.0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        sys.exit("PSS is read from /proc/PID/smaps_rollup: Linux only")
    rows = []
    for size in given.adapter_mb:
        rows.append(measured(size))
        print(json.dumps(rows[-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
