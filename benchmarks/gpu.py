"""What an accelerator must show: `make gpu`, or `python -m benchmarks.gpu [--tiny] [--sizes 0.5b]`.

    equality   a short run on the card and on the host: how far the last adapters are apart
    resume     a run that stopped and went on: tensors whose bits are not the whole run's
    memory     what a client was said to need against what it took
    speed      FlowerTune's pattern and ours in turns, for 1 to 64 clients; a DP step beside a plain
               one and Opacus'; the certificate's share of a round
    quantised  ours on a base of 4 bits (bitsandbytes) and of int8 (torchao)

Llamas of random weights and made-up rows: nothing is fetched. Rows are in the order of what matters
most. Each is printed with its verdict as it is known, and written down at once: a run that was cut
goes on with the parts that have not ended on this device with these settings and packages.

    yes, NO    it meets its target, or does not
    recorded   it has none
    skipped    what it needs is not here: it is tried again by the next run
    FAILED     its part ended with an error: the others are measured all the same, and it is tried
               again too

--tiny: small, on a pretend card, which shows that every row runs and nothing of a card.
"""

import argparse
import contextlib
import gc
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import gpu_rows, gpu_speed
from benchmarks.gpu_rows import Bench, SkippedError
from benchmarks.measure import Row, machine
from fedlora.training import cache, devices
from fedlora.training.quiet import quiet_libraries

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "peft", "opacus", "bitsandbytes", "torchao")
VERDICTS = {True: "yes", False: "NO", None: "recorded"}


@dataclass(frozen=True)
class Part:
    """Rows that are measured together, or not at all."""

    name: str
    rows: Callable[[Bench], Iterator[Row]]


def parts(sizes: Sequence[str]) -> list[Part]:
    """All of them, in their order."""
    first = sizes[0]
    return [
        *(Part(f"equality, {what}", lambda b, w=what: gpu_rows.equality(b, w))
          for what in gpu_rows.EQUAL),
        Part("resume", gpu_rows.resume),
        *(Part(f"memory {s}", lambda b, s=s: gpu_rows.memory(b, s)) for s in sizes[:1]),
        Part(f"speed {first}", lambda b: gpu_speed.side_by_side(b, first)),
        Part(f"DP step {first}", lambda b: gpu_speed.private(b, first)),
        Part(f"certificate {first}", lambda b: gpu_speed.certificate(b, first)),
        *(Part(f"speed {s}", lambda b, s=s: gpu_speed.side_by_side(b, s)) for s in sizes[1:]),
        *(Part(f"quantised {s}, {kind}", lambda b, s=s, k=kind: gpu_speed.quantised(b, s, k))
          for s in sizes for kind in gpu_speed.KINDS),
    ]  # fmt: skip


# -- the record -----------------------------------------------------------------------------------


@dataclass
class Record:
    """What was measured on which device with which settings; written after every row."""

    path: Path | None
    """None: kept nowhere."""
    device: str
    settings: dict[str, Any]
    found: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def at(cls, path: Path | None, device: str, settings: dict[str, Any], fresh: bool) -> "Record":
        """With the parts that are written there, unless it is to start anew."""
        found = []
        if path is not None and path.is_file() and not fresh:
            found = json.loads(path.read_text())["parts"]
        return cls(path, device, settings, found)

    def done(self, name: str) -> dict[str, Any] | None:
        """A part that ended on this device with these settings."""
        key = {"part": name, "device": self.device, "settings": self.settings, "ended": "done"}
        return next((x for x in self.found if key.items() <= x.items()), None)

    def begin(self, name: str) -> dict[str, Any]:
        """A new entry in place of what is there of this part, device and settings."""
        key = {"part": name, "device": self.device, "settings": self.settings}
        self.found = [x for x in self.found if not key.items() <= x.items()]
        entry = {**key, "time": datetime.now(UTC).isoformat(timespec="seconds"),
                 "machine": machine(), "ended": "cut", "rows": []}  # fmt: skip
        self.found.append(entry)
        self.write()
        return entry

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".json.tmp")
        part.write_text(json.dumps({"parts": self.found}, indent=1) + "\n")
        part.replace(self.path)


# -- the run --------------------------------------------------------------------------------------


def show(row: dict[str, Any], verdict: str) -> None:
    value = "-" if row["value"] is None else f"{row['value']:.4g}"
    print(f"{row['name']:68} {value:>10} {row['target']:9} {verdict:9} {row['how']}", flush=True)


def measure(todo: Sequence[Part], bench: Bench, record: Record) -> bool:
    """Every part that the record lacks, in order; whether none failed or missed its target."""
    good = True
    for part in todo:
        entry = record.done(part.name)
        if entry is not None:
            print(f"[{part.name}: measured {entry['time']}; --fresh measures anew]")
            for row in entry["rows"]:
                show(row, VERDICTS[row["met"]])
        else:
            entry = record.begin(part.name)
            begun = time.perf_counter()
            take(part, bench, record, entry)
            print(f"[{part.name}: {entry['ended']}, {time.perf_counter() - begun:.0f} s]")
        good &= entry["ended"] != "failed" and all(x["met"] is not False for x in entry["rows"])
    return good


def take(part: Part, bench: Bench, record: Record, entry: dict[str, Any]) -> None:
    """Measure one part; its rows as they come, and how it ended, go into the record."""

    def add(row: Row, verdict: str) -> None:
        show(row.record(), verdict)
        entry["rows"].append(row.record())
        record.write()

    try:
        for row in part.rows(bench):
            add(row, VERDICTS[row.met])
        entry["ended"] = "done"
    except (SkippedError, devices.OutOfMemory) as e:
        why = str(e) if isinstance(e, SkippedError) else "the card's memory does not suffice"
        entry["ended"] = "skipped"
        add(Row(part.name, None, "", f"skipped: {why}"), "skipped")
    except Exception as e:
        traceback.print_exc()
        entry["ended"] = "failed"
        add(Row(part.name, None, "", f"failed: {type(e).__name__}: {e}"[:300]), "FAILED")
    record.write()
    if entry["ended"] != "done":
        cache.forget_model()
    if not devices.is_host(bench.device):
        gc.collect()
        devices.release(bench.device)


def installed() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def sizes(given: str) -> list[str]:
    chosen = given.split(",")
    if wrong := [x for x in chosen if x not in gpu_rows.SIZES]:
        raise argparse.ArgumentTypeError(f"{wrong[0]}: must be of {', '.join(gpu_rows.SIZES)}")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small, on a pretend card")
    parser.add_argument("--sizes", type=sizes, help="of the bases, such as 0.5b,8b, the default")
    parser.add_argument("--budget", type=float, help="seconds of a series of clients; 60")
    parser.add_argument("--fresh", action="store_true", help="measure what was measured as well")
    parser.add_argument("--out", type=Path, help="the record's folder; benchmarks/results")
    parser.add_argument("--only", default="", help="the parts that begin so, such as 'speed'")
    given = parser.parse_args()
    chosen = given.sizes or (["0.5b"] if given.tiny else ["0.5b", "8b"])
    budget = given.budget or (1.0 if given.tiny else 60.0)
    out = given.out or (None if given.tiny else ROOT / "benchmarks/results")
    quiet_libraries()
    with contextlib.ExitStack() as stack:
        if given.tiny:
            from tests.support import pretend_device

            stack.enter_context(pretend_device.cards())
        device = devices.chosen("auto")
        if devices.is_host(device):
            print("no accelerator that torch knows; TINY=1 runs on a pretend one")
            return 2
        name = devices.name_of(device)
        print(f"on {name}", flush=True)
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(root, device, given.tiny, budget)
        settings = {"tiny": given.tiny, "budget": budget, **installed()}
        path = out / "gpu.json" if out else None
        record = Record.at(path, name, settings, given.fresh or given.tiny)
        todo = [part for part in parts(chosen) if part.name.startswith(given.only)]
        return int(not measure(todo, bench, record))


if __name__ == "__main__":
    raise SystemExit(main())
