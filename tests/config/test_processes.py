"""How many processes a simulation has, by what the platform can do."""

import os
import subprocess
import sys
import time

import pytest

from fedlora.config.processes import workers
from fedlora.errors import ConfigError


@pytest.mark.parametrize(
    ("fork", "platform", "several"),
    [(True, "linux", 5), (False, "win32", 1), (False, "linux", 1), (True, "darwin", 1)],
)
def test_the_default_is_a_process_a_core_on_linux_and_one_where_there_is_no_fork(
    monkeypatch: pytest.MonkeyPatch, fork: bool, platform: str, several: int
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    if not fork:
        monkeypatch.delattr(os, "fork")
    assert workers(0) == several
    assert workers(1) == 1
    if fork:
        assert workers(3) == 3
    else:
        with pytest.raises(ConfigError, match=r"simulate\.workers = 3: .* set it to 1"):
            workers(3)


FAMILY = """
import multiprocessing, time
from fedlora.config.processes import end_with_parent

def child(follows):
    if follows:
        end_with_parent()
    print("here", flush=True)
    time.sleep(60 if follows else 1)

multiprocessing.get_context("fork").Process(target=child, args=({follows},)).start()
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("follows", [True, False])
def test_a_child_ends_with_a_parent_that_is_killed_and_else_goes_on(follows: bool) -> None:
    code = FAMILY.replace("{follows}", str(follows))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"here\n"
        parent.kill()
        begun = time.monotonic()
        parent.stdout.read()  # ends as the last process that could write does
        took = time.monotonic() - begun
        assert took < 30 if follows else took > 0.5
