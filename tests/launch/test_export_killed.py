"""An export that is killed leaves the old directory, none or the new one, and never a half."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, shutil, signal, sys
from pathlib import Path
from fedlora.launch.export_directory import placed

out, at = Path(sys.argv[1]), int(sys.argv[2])
done = [0]

def killing(call):
    def instead(*args, **kwargs):
        done[0] += 1
        if done[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return instead

for module, name in ((os, "replace"), (os, "mkdir"), (shutil, "rmtree"), (Path, "write_text")):
    setattr(module, name, killing(getattr(module, name)))
with placed(out, {"made": "new"}) as new:
    (new / "first").write_text("new")
    (new / "second").write_text("new")
"""
STEPS = 14
"""More than it has of calls that change a disk."""


def exported(out: Path, at: int) -> int:
    return subprocess.run([sys.executable, "-c", SCRIPT, str(out), str(at)]).returncode


def found(out: Path) -> set[str]:
    """Of which export the files of a directory are; of a whole one there is one word."""
    if not out.exists():
        return {"none"}
    made = json.loads((out / "fedlora-export.json").read_text())["made"]
    return {made, *((out / name).read_text() for name in ("first", "second"))}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("before", [False, True], ids=["nothing", "an export"])
def test_a_killed_export_leaves_the_old_the_new_or_none_whole(tmp_path: Path, before: bool) -> None:
    seen = []
    for at in range(1, STEPS + 1):
        out = tmp_path / str(at) / "out"
        out.parent.mkdir()
        if before:
            out.mkdir()
            for name in ("first", "second"):
                (out / name).write_text("old")
            (out / "fedlora-export.json").write_text('{"made": "old"}')
        killed = exported(out, at) == -signal.SIGKILL
        seen.append((killed, found(out)))
        assert found(out) in ({"none"}, {"old"}, {"new"}), f"killed at step {at}"
        if not killed:
            assert found(out) == {"new"}
        assert exported(out, STEPS + 1) == 0, "and the next one is made all the same"
        assert found(out) == {"new"}
    assert (True, {"old" if before else "none"}) in seen
    assert seen[-1] == (False, {"new"}), "all of its steps were tried"
