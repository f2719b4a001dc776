"""Are the tests of privacy and of secure aggregation able to fail? `make mutants`.

    python tests/support/mutants.py
                   plant each slip of mutants.toml, one at a time, and run the tests named for it
    --only TEXT    only those with this in their name
    --out DIR      where mutants.json and mutants.md go

A slip that its test does not see survives, and the command fails; so does a test that fails without
any slip. What is on record of the same sources is not run again: after a cut the same command goes
on. Each slip is planted in a copy of the tracked files, never here.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_suffix(".toml")
LONGEST = 900
"""Seconds of one slip's tests. One that takes longer is broken, not killed, and runs again: on a
machine that is busy any would."""
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Mutant:
    """One slip that somebody could make."""

    name: str
    about: str
    """privacy, ledger or protocol."""
    file: str
    edits: tuple[tuple[str, str], ...]
    """What is replaced, and by what; each occurs once in the file."""
    tests: tuple[str, ...]
    """Ids for pytest; one that fails is enough."""

    def planted(self, text: str) -> str:
        """The file with the slip in it.

        Raises:
            ValueError: its place is not there, or not once.
        """
        for old, new in self.edits:
            if text.count(old) != 1:
                raise ValueError(f"{self.file} holds {text.count(old)} times, not once: {old!r}")
            text = text.replace(old, new)
        return text


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    fate: str
    """killed, survived, or broken: the tests did not run, or fail without it."""
    by: str
    """The first test that failed, or what was wrong."""
    seconds: float


def mutants(path: Path = LIST) -> list[Mutant]:
    """What is listed."""
    listed = tomllib.loads(path.read_text())["mutant"]
    return [
        Mutant(m["name"], m["about"], m["file"], tuple(map(tuple, m["edits"])), tuple(m["tests"]))
        for m in listed
    ]


def tracked() -> list[str]:
    """Files of the checkout, new ones too, that git does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def digest(names: Sequence[str]) -> str:
    """Of the sources: another record begins where one of them changes."""
    found = hashlib.sha256()
    for name in sorted(names):
        if name.startswith(("fedlora/", "tests/")):
            found.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return found.hexdigest()[:16]


def copy_to(there: Path, names: Sequence[str]) -> None:
    for name in names:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, there / name)


HEAVY = ["torch", "transformers", "peft", "flwr.app", "opacus", "scipy.stats", "pytest"]
"""What each test run would else import anew; nothing of the sources."""


def failing(there: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status, and the first test that failed, in a process of its own."""
    context = get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    how = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    how += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins among HEAVY
    with tempfile.NamedTemporaryFile("r") as said:
        child = context.Process(target=_pytest, args=(str(there), [*how, *tests], said.name))
        child.start()
        child.join(LONGEST)
        if child.exitcode is None:
            with suppress(ProcessLookupError):  # it has begun no group of its own yet
                os.killpg(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
            child.kill()
            return -1, f"no end within {LONGEST} s"
        text = said.read()
    found = re.search(r"^(?:FAILED|ERROR) \S+::(.+?)(?: - .*)?$", text, re.MULTILINE)
    return child.exitcode, found[1] if found else text[-300:].strip()


def _pytest(there: str, arguments: list[str], said: str) -> None:
    """pytest on the sources there; all it writes goes to that file. Ends the process."""
    os.setpgrp()
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(there)
    os.environ |= {"PYTHONPATH": there, "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [there, *(x for x in sys.path if Path(x or ".").resolve() != ROOT)]
    for name in [x for x in sys.modules if x.split(".")[0] in ("tests", "fedlora")]:
        del sys.modules[name]
    import pytest

    status = int(pytest.main(arguments))
    sys.stdout.flush()
    os._exit(status)


def sound(there: Path, listed: Sequence[Mutant]) -> str:
    """What fails without any slip; empty where nothing does."""
    every = sorted({test for m in listed for test in m.tests})
    status, said = failing(there, ["-n", str(WORKERS), *every])
    return said if status else ""


def tried(there: Path, mutant: Mutant) -> Outcome:
    """Plant it in the copy, run its tests, and take it out again."""
    begun, file = time.monotonic(), there / mutant.file
    whole = file.read_text()
    try:
        file.write_text(mutant.planted(whole))
        status, said = failing(there, mutant.tests)
    except ValueError as e:
        status, said = -1, str(e)
    finally:
        file.write_text(whole)
    fate = {0: "survived", 1: "killed"}.get(status, "broken")
    return Outcome(mutant.name, fate, said if status else "", round(time.monotonic() - begun, 1))


def outcomes(listed: Sequence[Mutant], copies: Sequence[Path]) -> Iterator[Outcome]:
    """Of each, as they end; one at a time in each copy."""
    free: SimpleQueue[Path] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def one(mutant: Mutant) -> Outcome:
        copy = free.get()
        try:
            return tried(copy, mutant)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        for done in as_completed([pool.submit(one, m) for m in listed]):
            yield done.result()


def table(listed: Sequence[Mutant], found: dict[str, Outcome]) -> str:
    """As a page of the documentation."""
    lines = ["| slip | about | file | seen by |", "|---|---|---|---|"]
    for m in listed:
        outcome = found.get(m.name)
        by = "not run" if outcome is None else outcome.by if outcome.fate == "killed" else (
            f"**{outcome.fate}** {outcome.by}")  # fmt: skip
        lines.append(f"| {m.name} | {m.about} | `{m.file}` | {by.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/mutants")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    names, record = tracked(), asked.out / "mutants.json"
    sources = digest(names)
    old = json.loads(record.read_text()) if record.is_file() else {}
    found = {o["name"]: Outcome(**o) for o in old.get("outcomes", [])}
    if old.get("sources") != sources:
        found = {}
    listed = [m for m in mutants() if asked.only in m.name]
    left = [m for m in listed if m.name not in found or found[m.name].fate == "broken"]
    with tempfile.TemporaryDirectory(prefix="fedlora-mutants-") as where:
        copies = [Path(where, str(n)) for n in range(WORKERS)]
        for copy in copies if left else []:
            copy_to(copy, names)
        if left and (problem := sound(copies[0], left)):
            print(f"without any slip a test fails: {problem}")
            return 1
        for outcome in outcomes(left, copies) if left else ():
            found[outcome.name] = outcome
            print(
                f"{outcome.fate:9}{outcome.seconds:6.0f} s  {outcome.name}  {outcome.by}",
                flush=True,
            )
            record.write_text(
                json.dumps({"sources": sources, "outcomes": [asdict(o) for o in found.values()]})
            )
    (asked.out / "mutants.md").write_text(table(listed, found))
    alive = [m.name for m in listed if found[m.name].fate != "killed"]
    print(f"{len(listed) - len(alive)} of {len(listed)} slips seen")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
