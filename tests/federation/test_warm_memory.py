"""What a process has freed and keeps is not faulted in again."""

import platform
import subprocess
import sys

import pytest

from tests.support.tiny_federation import ROOT

FAULTS = """
import resource, sys
if sys.argv[1] == "kept":
    from fedlora.federation.server.allocator import keep_freed_memory
    keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * (30 * 2**20) for _ in range(3)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del blocks
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own setting")
def test_freed_memory_that_is_kept_is_not_faulted_in_again() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < 100
    assert faults("given back") > 1000
