"""Two processes never write one run: the second is told so, and the first loses nothing."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.errors import CheckpointError
from fedlora.federation.server import one_writer
from fedlora.federation.server.one_writer import only_writer
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_writer, "PATIENCE", 0.0)


def test_nothing_stays_of_the_lock_nor_of_a_directory_that_was_made_for_it(tmp_path: Path) -> None:
    with only_writer(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with only_writer(tmp_path / "run"):
        (tmp_path / "run" / "rounds.jsonl").touch()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["rounds.jsonl"]


def test_a_run_that_another_process_writes_is_refused_and_left_as_it_is(
    settings: Settings, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    given = settings(**quick("fedavg", **{"run.rounds": 1, "clients.count": 2}))
    with only_writer(directory), pytest.raises(CheckpointError, match="by another process; wait"):
        federate(given)
    assert not directory.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_lock_of_a_process_that_is_killed_holds_nobody_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def hold() -> None:
        with only_writer(tmp_path):
            there.send("held")
            signal.pause()

    process = context.Process(target=hold)
    process.start()
    assert here.recv() == "held"
    with pytest.raises(CheckpointError, match="by another process"), only_writer(tmp_path):
        pass
    process.kill()
    process.join()
    with only_writer(tmp_path):
        pass
