"""The privacy lab: what an experiment's privacy costs, and what attacks get out of it.

    fedlora privacy audit privacy
    fedlora privacy audit privacy --quick

    utility      accuracy by strategy and epsilon, beside a linear probe under the same epsilon
    membership   LiRA-lite and the loss threshold on models; the server's seat on single updates
    language     loss, min-k and a reference model on a causal language model; extraction: exposure
    secure       a server that lies in a secure aggregation; leaks: the certificate's fields
    canaries     a measured lower bound on epsilon, and the same with bugs planted
    one-run      the same of a whole federated run, and what it would find
    inversion    how much of a sentence one upload gives away, by strategy, rank and budget; the
                 same by descent on inputs: optimised

Each measurement is a row in a file of its own, OUT/rows/NAME.json, so what is done is not done
again: the same command goes on where it was stopped. The report is OUT/privacy.html.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.errors import FedLoraError, PrivacyError
from fedlora.launch.lab import attacks, channel_attacks, text_attacks, utility
from fedlora.launch.lab.attacks import FAILS
from fedlora.launch.lab.plan import Lab, Measurement, Row
from fedlora.lora.tree_file import write_atomically
from fedlora.reports.units import duration
from fedlora.training.devices import check_fork

PARTS: Mapping[str, Callable[..., Row]] = {
    "canaries": attacks.canary,
    "one-run": attacks.whole_run,
    "power": attacks.power,
    "probe": utility.probe,
    "inversion": attacks.inversion,
    "optimised": text_attacks.optimised,
    "secure": channel_attacks.secure,
    "leaks": channel_attacks.leaks,
    "language": text_attacks.language,
    "extraction": text_attacks.extraction,
    "shadows": attacks.shadows,
    "seat": attacks.server_seat,
    "utility": utility.federation,
}
"""Each takes the lab and its row's labels, and gives what it measured."""


def run(lab: Lab, workers: int = 1, say: Callable[[str], None] = print) -> None:
    """Take the measurements that are missing, `workers` at a time.

    Raises:
        FedLoraError: the directory belongs to another experiment, or something could not be
            measured; everything else has been.
    """
    lab.open()
    measurements = lab.chosen()
    todo = [m for m in measurements if lab.row(m) is None]
    if len(todo) < len(measurements):
        say(f"{len(measurements) - len(todo)} of {len(measurements)} measurements are done already")
    with tempfile.TemporaryDirectory() as claims:
        children = [_forked(lab, todo, Path(claims), say) for _ in range(workers - 1)]
        try:
            _work(lab, todo, Path(claims), say)
        finally:
            for pid in children:
                os.waitpid(pid, 0)
    if missing := [m.name for m in todo if lab.row(m) is None]:
        raise FedLoraError(f"not measured: {', '.join(missing)}; the reasons stand above")


def _work(lab: Lab, todo: Sequence[Measurement], claims: Path, say: Callable[[str], None]) -> None:
    """Take measurements that no other process has taken, until there are none."""
    for n, measurement in enumerate(todo, 1):
        try:
            os.close(os.open(claims / str(n), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        begun = time.monotonic()
        try:
            row = {**measurement.labels, **PARTS[measurement.part](lab, **measurement.labels)}
        except FedLoraError as e:
            say(f"[{n}/{len(todo)}] {measurement.name}: {type(e).__name__}: {e}")
            continue
        row["seconds"] = time.monotonic() - begun
        write_atomically(lab.file(measurement), (json.dumps(row, indent=1) + "\n").encode())
        took = duration(row["seconds"])
        say(f"[{n}/{len(todo)}] {measurement.name}: {brief(row, measurement.labels)}  {took}")


def brief(row: Row, labels: Mapping[str, Any]) -> str:
    """A row's first numbers, for its progress line."""
    numbers = [(k, v) for k, v in row.items() if isinstance(v, float) and k not in labels]
    said = [f"{k} {v:.3g}" for k, v in numbers[:3] if k != "seconds"]
    return ", ".join([*said, *([str(row["verdict"])] if "verdict" in row else [])])


def _forked(lab: Lab, todo: Sequence[Measurement], claims: Path, say: Callable[[str], None]) -> int:
    """A process of its own that works on the same measurements; its id."""
    check_fork("--workers")
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _work(lab, todo, claims, say)
        status = 0
    except KeyboardInterrupt:
        status = 130
    finally:
        sys.stdout.flush()
        os._exit(status)


def failed(lab: Lab) -> list[str]:
    """The measurements that show that something claims more than holds."""
    return [m.name for m in lab.measurements() if (lab.row(m) or {}).get("verdict") == FAILS]


def main(lab: Lab, workers: int, command: str) -> Path:
    """The whole command; its report's path. However it ends, the report has what was measured.

    Raises:
        PrivacyError: what was measured refutes a claim.
    """
    from fedlora.launch.lab.page import write

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        run(lab, workers, say)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on where it was: {command}")
        raise
    finally:
        if (lab.out / "rows").exists():
            page = write(lab, command)
            say(f"report: {page}")
    if wrong := failed(lab):
        raise PrivacyError(
            f"refuted: {', '.join(wrong)}; what was claimed and what was measured is in {page}"
        )
    return page
