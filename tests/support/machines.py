"""Both commands on a machine that is not this one, as far as this one can play it: `make machines`.

    python tests/support/machines.py
                   the whole quickstart under each factor: about a minute each
    --short        the shortened quickstart, as tests/launch/test_quickstart.py has it
    --suite        the test suite under each factor instead: ten minutes each
    --pythons      other Pythons too; each makes an environment and downloads torch
    --only TEXT    only factors with this in their name, and the plain run
    --out DIR      where runs, logs and machines.json go

One factor at a time beside a plain run, never their product: an instruction set, a forced
precision, a number of workers, a Python. What this machine lacks is skipped, and said with its
reason. What is on record in machines.json, of the same sources on the same processor, is not run
again: after a cut the same command goes on.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "simulations/experiments/quickstart.toml"
SHORT = {
    "run.rounds": "3",
    "data.limit": "1400",
    "data.test-size": "500",
    "evaluate.clients": "false",
    "output.plots": "false",
    "simulate.workers": "1",
}
"""What shortens the quickstart and leaves its promise: better than a trained head."""

VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR")
"""How far torch's own loops, oneDNN (bfloat16 products) and MKL (float32 products) may go."""
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
"""torch's, each with all that is before it."""
PRECISIONS = ("float32", "bfloat16")
WORKERS = ("1", "2")
PYTHONS = ("3.11", "3.12", "3.13")

Found = dict[str, Any]


@dataclass(frozen=True)
class Factor:
    """One difference from the plain run, or none."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    same: bool = False
    """Nothing that it computes differs from the plain run, so it ends with the same bits."""
    lacking: str = ""
    """Why it cannot be had here."""


@dataclass(frozen=True)
class Machine:
    """What decides which factors there are."""

    capability: str
    precision: str
    """What "auto" comes to."""
    torch: str
    x86: bool = True
    processor: str = ""

    def __str__(self) -> str:
        return (
            f"{self.processor}, {os.cpu_count()} cores, {self.capability}, torch {self.torch}, "
            f"Python {platform.python_version()}"
        )


# -- factors ------------------------------------------------------------------------------------


def instruction_sets(on: Machine) -> list[Factor]:
    """torch's each, and of oneDNN and MKL the lowest and, where it can be named, the highest."""
    known = on.capability in CAPABILITIES
    highest = CAPABILITIES.index(on.capability) if known else 0
    found = [
        Factor(
            f"ATEN_CPU_CAPABILITY={name.lower()}",
            {"ATEN_CPU_CAPABILITY": name.lower()},
            same=name == on.capability,
            lacking="" if n <= highest else f"this processor has no more than {on.capability}",
        )
        for n, name in enumerate(CAPABILITIES)
    ]
    other = "" if on.x86 else "this processor is no x86"
    for variable, value, same in (
        ("ONEDNN_MAX_CPU_ISA", "SSE41", False),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", True),
        ("MKL_CBWR", "COMPATIBLE", False),
    ):
        name = f"{variable}={value}"
        found.append(Factor(name, {variable: value}, same=same, lacking=other))
    return found


def factors(on: Machine, pythons: Sequence[Factor] = ()) -> list[Factor]:
    """The plain run first, then each factor alone."""
    return [
        Factor("plain"),
        *instruction_sets(on),
        *(
            Factor(f"train.precision={p}", settings={"train.precision": p}, same=p == on.precision)
            for p in PRECISIONS
        ),
        *(
            Factor(f"simulate.workers={n}", settings={"simulate.workers": n}, same=True)
            for n in WORKERS
        ),
        *pythons,
    ]


def pythons(download: bool) -> list[Factor]:
    """Each Python that fedlora takes: its path where one runs that is not this one."""
    mine = "{}.{}".format(*sys.version_info[:2])
    found = []
    for version in PYTHONS:
        candidates = list(places(version))
        path = next((p for p in candidates if runs(p, version)), "")
        if version == mine:
            lacking = "the plain run's"
        elif not path:
            lacking = f"{candidates[0]} does not run" if candidates else "none on PATH or in pyenv"
        else:
            lacking = "" if download else "it is here; --pythons makes its environment"
        found.append(Factor(f"python{version}", python=path, lacking=lacking))
    return found


def places(version: str) -> Iterator[str]:
    """Where a Python of this version may be: on PATH, of which shims are a part, and in pyenv."""
    for directory in os.environ.get("PATH", "").split(os.pathsep):
        if path := shutil.which(f"python{version}", path=directory or "."):
            yield path
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=False).stdout
        made = Path(root.strip()).glob(f"versions/{version}*/bin/python{version}")
        yield from map(str, sorted(made))


def runs(path: str, version: str) -> bool:
    """Does it really run? A shim may stand for a version that is not there."""
    code = "import ssl, sys, venv; print('%d.%d' % sys.version_info[:2])"
    ran = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
    return ran.returncode == 0 and ran.stdout.strip() == version


# -- one run ------------------------------------------------------------------------------------


def environment(factor: Factor) -> dict[str, str]:
    """This process's, without a word on instruction sets but the factor's own."""
    inherited = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return {**inherited, "PYTHONPATH": str(ROOT), **factor.environment}


PROBE = """
import json, sys, torch
from fedlora.training.precision import resolved
print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(),
                  "precision": resolved(sys.argv[1]), "torch": torch.__version__}))
"""


def probe(factor: Factor, python: str) -> dict[str, str]:
    """torch's capability, the precision of a run, and torch's version under the factor."""
    command = [python, "-c", PROBE, factor.settings.get("train.precision", "auto")]
    ran = subprocess.run(
        command, env=environment(factor), cwd=ROOT, capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(ran.stdout)
    return found


def this_machine() -> Machine:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    named = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    processor = named[0] if named else platform.machine()
    return Machine(**probe(Factor("plain"), sys.executable), x86=is_x86(), processor=processor)


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def timed(command: Sequence[str], factor: Factor, log: Path) -> Found:
    """Exit code, seconds, and the CPU seconds of the process with all that it waited for."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with log.open("w") as out:
        ran = subprocess.run(
            command, env=environment(factor), cwd=ROOT, stdout=out, stderr=out, check=False
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"code": ran.returncode, "seconds": time.monotonic() - begun, "cpu": cpu}


def quickstart(
    factor: Factor, python: str, directory: Path, changes: Mapping[str, str] | None = None
) -> Found:
    """The quickstart under a factor: how it ended, its scores, and its adapter's digest."""
    settings = {**(changes or {}), **factor.settings, "run.out": str(directory)}
    command = [python, "-m", "fedlora.cli", "simulate", str(QUICKSTART), "--quiet"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    found = {**probe(factor, python), **timed(command, factor, directory / "log")}
    run = directory / "quickstart"
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        adapter = (run / "adapter/adapter_model.safetensors").read_bytes()
        found |= {
            "accuracy": summary["final"]["accuracy"],
            "head": summary["baselines"]["trained head only"]["accuracy"],
            "warnings": summary["warnings"],
            "adapter": hashlib.sha256(adapter).hexdigest(),
        }
    return found


def suite(factor: Factor, python: str, directory: Path) -> Found:
    """The test suite under a factor: how many passed, and the names of those that did not."""
    directory.mkdir(parents=True, exist_ok=True)
    results = directory / "results.xml"
    results.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-n", "2", "-m", "not slow", "-p", "no:cacheprovider"]
    command.append(f"--junitxml={results}")
    found = {**probe(factor, python), **timed(command, factor, directory / "log")}
    if results.exists():
        found |= counted(results)
    return found


def counted(results: Path) -> Found:
    """passed, skipped, and failed by name, of pytest's JUnit XML."""
    cases = list(ET.parse(results).iter("testcase"))
    kinds = [{child.tag for child in case} for case in cases]
    named = [f"{c.get('classname')}::{c.get('name')}" for c in cases]
    failed = [n for n, k in zip(named, kinds, strict=True) if k & {"failure", "error"}]
    skipped = sum("skipped" in k for k in kinds)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def in_environment(factor: Factor, run: Callable[[str], Found]) -> Found:
    """Run with this Python, or with the factor's in an environment that lasts as long."""
    if not factor.python:
        return run(sys.executable)
    with tempfile.TemporaryDirectory(prefix="fedlora-machines-") as directory:
        ready = f"{directory}/.venv/.ready"
        command = ["make", "-C", str(ROOT), f"VENV={directory}/.venv", f"PYTHON={factor.python}"]
        made = subprocess.run([*command, ready], check=False)
        if made.returncode:
            return {"code": made.returncode, "error": "its environment cannot be made"}
        return run(f"{directory}/.venv/bin/python")


# -- verdicts and tables ------------------------------------------------------------------------


def verdict(factor: Factor, found: Found, plain: Found) -> str:
    """What is wrong with a quickstart under a factor; "ok" where nothing is."""
    if found["code"] or "accuracy" not in found:
        return found.get("error", f"exit code {found['code']}")
    wrong = []
    if found["accuracy"] <= found["head"]:
        wrong.append("no better than a trained head")
    if found["warnings"]:
        wrong.append(f"warnings: {' '.join(found['warnings'])}")
    if factor.same and found["adapter"] != plain.get("adapter"):
        wrong.append("other bits than the plain run")
    return ", ".join(wrong) or ("ok, the same bits" if factor.same else "ok")


def verdict_of_suite(found: Found) -> str:
    if "failed" not in found:
        return str(found.get("error", f"exit code {found['code']}"))
    failed = ", ".join(found["failed"])
    return failed or ("ok" if found["code"] == 0 else f"exit code {found['code']}")


def times(found: Found, plain: Found, key: str) -> str:
    return f"{found[key] / plain[key]:.2f}" if key in found and plain.get(key) else "-"


def row(factor: Factor, found: Found, plain: Found) -> list[str]:
    scores = (f"{100 * found[k]:.1f} %" if k in found else "-" for k in ("accuracy", "head"))
    seconds = f"{found['seconds']:.0f}" if "seconds" in found else "-"
    ratios = (times(found, plain, "seconds"), times(found, plain, "cpu"))
    ended = verdict(factor, found, plain)
    return [factor.name, found.get("precision", "-"), *scores, seconds, *ratios, ended]


def row_of_suite(factor: Factor, found: Found, plain: Found) -> list[str]:
    failed = found.get("failed")
    counts = [
        found.get("passed", "-"),
        found.get("skipped", "-"),
        "-" if failed is None else len(failed),
    ]
    seconds = f"{found['seconds']:.0f}" if "seconds" in found else "-"
    return [
        factor.name,
        *map(str, counts),
        seconds,
        times(found, plain, "cpu"),
        verdict_of_suite(found),
    ]


HEADS = {
    row: ("factor", "precision", "accuracy", "trained head", "seconds", "of plain", "CPU, of plain",
          "verdict"),
    row_of_suite: ("factor", "passed", "skipped", "failed", "seconds", "CPU, of plain", "verdict"),
}  # fmt: skip


def table(
    wanted: Sequence[Factor], found: Mapping[str, Found], line: Callable[..., list[str]]
) -> str:
    """Markdown; a factor that is lacking has its reason in the last column."""
    head = HEADS[line]
    plain = found.get("plain", {})
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for factor in wanted:
        if factor.name in found:
            cells = line(factor, found[factor.name], plain)
        else:
            reason = f"skipped: {factor.lacking}" if factor.lacking else "not run"
            cells = [factor.name, *["-"] * (len(head) - 2), reason]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -- the record ---------------------------------------------------------------------------------


def sources(tests: bool) -> str:
    """A digest of what a run depends on; of the tests too where they are what is run."""
    names = ["fedlora", "server_app", "client_app", *(["tests"] if tests else [])]
    paths = [p for n in names for p in sorted((ROOT / n).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in [*paths, QUICKSTART, ROOT / "pyproject.toml", ROOT / "constraints.txt"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Record:
    """machines.json: what was found, by mode and factor, of these sources on this machine."""

    def __init__(self, path: Path, mode: str, of: str) -> None:
        self.path, self.mode, self.of = path, mode, of
        self.modes = json.loads(path.read_text()) if path.exists() else {}
        if self.modes.get(mode, {}).get("of") != of:
            self.modes[mode] = {"of": of, "found": {}}

    @property
    def found(self) -> dict[str, Found]:
        found: dict[str, Found] = self.modes[self.mode]["found"]
        return found

    def keep(self, name: str, found: Found) -> None:
        """On disk at once, whole or not at all."""
        self.found[name] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps(self.modes, indent=1) + "\n")
        new.replace(self.path)


def fill(record: Record, wanted: Sequence[Factor], run: Callable[[Factor], Found]) -> None:
    """Run each factor that can be had and is not on record."""
    for factor in wanted:
        if not factor.lacking and factor.name not in record.found:
            print(f"{factor.name} ...", file=sys.stderr, flush=True)
            record.keep(factor.name, run(factor))


def of_the_suite(factor: Factor) -> Factor:
    """The same factor, lacking where it is a setting: tests set theirs themselves."""
    if not factor.settings:
        return factor
    return Factor(factor.name, lacking="the tests set it themselves")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--suite", action="store_true")
    parser.add_argument("--pythons", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/machines")
    given = parser.parse_args()
    on, out = this_machine(), given.out.resolve()
    wanted = factors(on, pythons(given.pythons))
    wanted = [f for f in wanted if given.only in f.name or f.name == "plain"]
    if given.suite:
        wanted = [of_the_suite(f) for f in wanted]
    mode = "suite" if given.suite else "short" if given.short else "quickstart"
    changes = SHORT if given.short else {}

    def run(factor: Factor) -> Found:
        directory = out / mode / factor.name
        if given.suite:
            return in_environment(factor, lambda python: suite(factor, python, directory))
        return in_environment(factor, lambda python: quickstart(factor, python, directory, changes))

    record = Record(out / "machines.json", mode, f"{sources(given.suite)} {on}")
    fill(record, wanted, run)
    print(f"{on}\n\n{table(wanted, record.found, row_of_suite if given.suite else row)}")
    plain = record.found["plain"]
    judged = [
        verdict_of_suite(record.found[f.name])
        if given.suite
        else verdict(f, record.found[f.name], plain)
        for f in wanted
        if f.name in record.found
    ]
    return int(not all(v.startswith("ok") for v in judged))


if __name__ == "__main__":
    sys.exit(main())
