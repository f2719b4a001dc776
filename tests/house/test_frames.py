"""How far it is from the command to the optimizer's step, in frames of ours."""

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import cli
from tests.support.tiny_federation import ROOT

OURS = tuple(f"{ROOT / name}/" for name in ("fedlora", "server_app", "client_app"))


def test_from_the_command_to_a_clients_step_it_is_few_frames_in_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a step of the second client of the quickstart, with one worker.

    The pull-driven aggregation is in it, which bounds the server's memory to one update.
    """
    seen: list[list[traceback.FrameSummary]] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        stack = [f for f in traceback.extract_stack()[:-1] if f.filename.startswith(OURS)]
        if not any(Path(f.filename).stem == "training_check" for f in stack):
            seen.append(stack)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    changes = {
        "simulate.workers": 1, "run.rounds": 1, "run.out": tmp_path, "data.limit": 700,
        "clients.count": 3, "train.steps": 1, "evaluate.baselines": "false",
        "output.plots": "false",
    }  # fmt: skip
    sets = [x for key, value in changes.items() for x in ("--set", f"{key}={value}")]
    monkeypatch.setattr("sys.argv", ["fedlora", "simulate", "quickstart", "--quiet", *sets])
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 0
    assert len(seen) == 3
    second = [f"{Path(f.filename).name}:{f.name}" for f in seen[1]]
    assert second[0] == "cli.py:main"
    assert second[-1] == "train.py:steps"
    assert len(second) <= 14, second
    assert len({f.filename for f in seen[1]}) <= 10, second
