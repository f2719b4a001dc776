"""The quickstart itself, shortened: the real model on real questions, in both precisions.

The bar is the same frozen model with a trained head, which sees all clients' rows together. Where a
processor emulates bfloat16 its half is a long test: it took 20 minutes on one with AVX2 alone.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.training.precision import lacking
from tests.support.machines import QUICKSTART, ROOT, SHORT

EMULATED = pytest.mark.slow if lacking() else ()


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=EMULATED)])
def test_the_quickstart_beats_a_trained_head(tmp_path: Path, precision: str) -> None:
    changes = {**SHORT, "run.out": tmp_path, "train.precision": precision}
    command = [sys.executable, "-m", "fedlora.cli", "simulate",
               str(QUICKSTART), "--quiet"]  # fmt: skip
    for key, value in changes.items():
        command += ["--set", f"{key}={value}"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    head = summary["baselines"]["trained head only"]["accuracy"]
    assert summary["final"]["accuracy"] > head, summary["warnings"]
    assert summary["warnings"] == []
