"""All of docs/use/benchmarks.md in one run: `make bench`, or `python -m benchmarks.run [--quick]`.

    --quick          the smallest size of each, in three minutes: that every row still runs
    --only NAME      one group of rows
    --out DIR        where latest.json goes; else to benchmarks/results, a part of the groups or
                     --quick to runs/benchmarks; all in full write docs/use/benchmarks.md, too

Each group runs in a forked process of its own, so that none leaves memory or threads to the next.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command itself sets it

from benchmarks import (
    aggregation,
    certificate,
    dp_samples,
    dp_step,
    engine,
    packing,
    start,
    training,
    wire,
)
from benchmarks.measure import Row, forked, machine

ROOT = Path(__file__).parent.parent
GROUPS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "aggregation": aggregation.rows,
    "truncation": aggregation.truncation,
    "memory": engine.memory,
    "cold-start": start.rows,
    "round-overhead": engine.overhead,
    "flowertune": training.flowertune,
    "workers": engine.workers,
    "growth": engine.growth,
    "step": training.step,
    "prefix-cache": training.prefix,
    "packing": packing.rows,
    "dp-step": dp_step.rows,
    "dp-samples": dp_samples.rows,
    "wire": wire.rows,
    "wire-accuracy": wire.accuracy,
    "certificate": certificate.rows,
    "cli": start.command,
    "batched-adapters": training.batched,
}


def group(name: str, quick: bool) -> list[Row]:
    """A group's rows; one that says why, where it fails."""
    try:
        return list(GROUPS[name](quick))
    except Exception as e:
        traceback.print_exc()
        return [Row(name, None, "", f"failed: {type(e).__name__}: {e}")]


def table(found: dict[str, object]) -> str:
    """The Markdown of docs/use/benchmarks.md."""
    rows: list[dict[str, object]] = found["rows"]  # type: ignore[assignment]
    on: dict[str, Any] = found["machine"]  # type: ignore[assignment]
    lines = [
        "# Benchmarks",
        "",
        f"Written by `make bench`, {found['time']}, on {on['cores']} cores, torch {on['torch']} "
        f"(load {on['load']:.1f} at the end).",
        "Every figure is a ratio or a count of two things measured side by side in the same run.",
        "What is behind them, what was missed and why: the [performance log](performance.md).",
        "On an accelerator: `make gpu`, "
        "[its rows and what has been seen](../gpu.md#what-a-card-must-show-make-gpu).",
        "",
        "| what | measured | target | met | how |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        value = "-" if r["value"] is None else f"{r['value']:.4g}"
        met = {True: "yes", False: "**no**", None: ""}[r["met"]]  # type: ignore[index]
        lines.append(f"| {r['name']} | {value} | {r['target']} | {met} | {r['how']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=list(GROUPS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    whole = not (given.quick or given.only)
    out = given.out or ROOT / ("benchmarks/results" if whole else "runs/benchmarks")
    os.chdir(ROOT)
    rows: list[Row] = []
    for name in given.only or GROUPS:
        begun = time.perf_counter()
        found = forked(group, name, given.quick)[0]
        for row in found:
            value = "-" if row.value is None else f"{row.value:.4g}"
            verdict = {True: "met", False: "NOT MET", None: ""}[row.met]
            print(f"{row.name:45} {value:>10}  {row.target:8} {verdict}", flush=True)
            if row.value is None:
                print(f"    {row.how}")
        print(f"    [{name}: {time.perf_counter() - begun:.0f} s]", flush=True)
        rows += found
    result = {
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "quick": given.quick,
        "machine": machine(),
        "rows": [row.record() for row in rows],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "latest.json").write_text(json.dumps(result, indent=1) + "\n")
    if whole:
        (ROOT / "docs/use/benchmarks.md").write_text(table(result))
    return int(any("failed" in row.how for row in rows if row.value is None))


if __name__ == "__main__":
    sys.exit(main())
