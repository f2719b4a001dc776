"""A 7B model's adapter through the server: how much memory that takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_federation import ROOT

pytestmark = pytest.mark.slow


def peak(directory: Path, clients: int) -> tuple[float, float]:
    """The server's peaks above its base model, in payloads: in its round, and before it."""
    directory.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "tests" / "support" / "echo_server.py")
    done = subprocess.run(
        [sys.executable, script, str(directory), str(clients)],
        env=env, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["payload"] == 134_217_728
    return found["peak"] / found["payload"], found["start"] / found["payload"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs /proc")
def test_the_server_holds_six_payloads_however_many_clients_send_one(tmp_path: Path) -> None:
    """Its state, the model's factors, a message, an upload, the sum; and one to spare."""
    (few, start), (many, _) = peak(tmp_path / "few", 2), peak(tmp_path / "many", 6)
    print(f"peak: {few:.2f} payloads with 2 clients, {many:.2f} with 6; {start:.2f} at the start")
    assert many < few + 0.5
    assert many < 6.5
    assert start < 10.0  # the training check trains: a gradient, two moments, what it puts back
