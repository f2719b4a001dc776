"""Logits of exports, loaded by a Python process that knows nothing of fedlora."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.errors import ModelError
from fedlora.launch import reload_card

Logits = list[Tensor]
"""Of each batch, float32: (b, classes) or (b, t, vocabulary)."""


def logits_elsewhere(
    directories: Sequence[Path], batches: Sequence[Mapping[str, Tensor]]
) -> list[Logits]:
    """What each export makes of the batches, by the script in its README.md. One process for all.

    Raises:
        ModelError: an export does not load there; with the last lines that the process said.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-") as made:
        inputs = {f"{i}.{k}": x for i, batch in enumerate(batches) for k, x in batch.items()}
        save_file({k: x.contiguous() for k, x in inputs.items()}, f"{made}/batches.safetensors")
        job = Path(made, "job.json")
        logits = f"{made}/logits-{{}}.safetensors"
        text = {
            "directories": [str(d.resolve()) for d in directories],
            "batches": f"{made}/batches.safetensors", "count": len(batches),
            "logits": logits, "threads": torch.get_num_threads(),
        }  # fmt: skip
        job.write_text(json.dumps(text), "utf-8")
        run_script(job)
        found = [load_file(logits.format(i)) for i in range(len(directories))]
    return [[x[str(i)] for i in range(len(batches))] for x in found]


def run_script(job: Path) -> None:
    """Run `reload_card` on the job, in a process of its own."""
    command = [sys.executable, "-P", str(reload_card.__file__), str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(
            "the export does not load with transformers and PEFT alone: "
            + " ".join(done.stderr.strip().splitlines()[-3:])
        )
