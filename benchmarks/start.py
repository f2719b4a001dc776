"""How long it takes until something happens: a simulation's cold start, and the command's."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Row

ROOT = Path(__file__).parent.parent


def rows(quick: bool) -> Iterator[Row]:
    """LocalGrid against Flower's Ray engine, each in a fresh process, imports and all."""
    size = ("2", "1", "0.5") if quick else ("10", "5", "8.8")
    what = "{} no-op clients x {} rounds x {} MB".format(*size)
    whole, beyond = _run("local", *size)
    yield Row(
        "cold start beyond imports, seconds", beyond, "<= 3", f"{what}, LocalGrid, fresh process"
    )
    if quick:
        how = "not run by --quick: Flower's own engine takes half a minute to start"
        yield Row("cold start: LocalGrid / Ray", None, "<= 0.1", how)
        return
    ray, _ = _run("ray", *size)
    yield Row(
        "cold start: LocalGrid / Ray", whole / ray, "<= 0.1",
        f"wall time of the process, {what}: {whole:.1f} s and {ray:.1f} s, same apps, same FedAvg",
    )  # fmt: skip


def _run(kind: str, *size: str) -> tuple[float, float]:
    """Wall seconds of the whole process, and those after its imports."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("OMP_NUM_THREADS", None)
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/noop.py"), kind, *size],
        env=env, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    took = time.perf_counter() - begun
    said = [x for x in done.stdout.splitlines() if x.startswith("seconds ")]
    if not said:
        raise RuntimeError(f"{kind}: {done.stderr[-600:]}")
    return took, float(said[0].split()[1])


def command(quick: bool) -> Iterator[Row]:
    """`fedlora --help`."""
    found = []
    for _ in range(1 if quick else 5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "fedlora.cli", "--help"], check=True, capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    yield Row("fedlora --help, CPU seconds", min(found), "<= 1", f"least of {len(found)} starts")
