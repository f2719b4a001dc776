"""A server's disk that gets full is spoken of in time."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.launch.deploy import endure, host
from fedlora.launch.deploy.disk import FREE, LARGE, Disk
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.scripts import DATABASE


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    made = Plan(tmp_path, 1, (4,), secure=False)
    made.server.mkdir()
    made.save()
    return made


def has_free(monkeypatch: pytest.MonkeyPatch, *free: float) -> None:
    """The disk has so much free when it is asked, and the last of them from then on."""
    left = [*free]

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=left.pop(0) if len(left) > 1 else left[0])

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_little_room_is_said_once_and_again_where_it_comes_back(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_free(monkeypatch, FREE + 1, FREE - 1, FREE - 2, FREE + 1, FREE - 1)
    looked = Disk(plan)
    found = [[*looked.news()] for _ in range(5)]
    assert [len(x) for x in found] == [0, 1, 0, 0, 1]
    assert "5.0 GB are free" in found[1][0]
    assert str(plan.server) in found[1][0]


def test_a_large_database_is_said_its_log_of_writes_included(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_free(monkeypatch, 10 * FREE)
    for name in (DATABASE, f"{DATABASE}-wal"):
        with (plan.server / name).open("wb") as file:
            file.truncate(int(LARGE) // 2)  # sparse: nothing of it is written
    assert [*Disk(plan).news()] == []
    with (plan.server / DATABASE).open("ab") as file:
        file.truncate(int(LARGE) // 2 + 1)
    (line,) = Disk(plan).news()
    assert "holds 20.0 GB" in line


def test_status_and_a_run_that_goes_on_say_it(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    has_free(monkeypatch, FREE + 1, FREE - 1)
    said: list[str] = []
    statuses = iter(["running", "running", "finished:completed"])
    asked = SimpleNamespace(status=lambda _: next(statuses))
    news = Disk(plan).news
    host.follow(asked, "1", plan.directory, said.append, 0.0, news=news)  # type: ignore[arg-type]
    assert sum("are free" in line for line in said) == 1
    shown = CliRunner().invoke(app, ["deploy", "status", str(plan.directory)])
    assert "are free" in shown.output


def test_the_run_command_looks_at_the_disk(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def followed(*args: object) -> str:
        seen.append(args[-1])
        return "finished:completed"

    monkeypatch.setattr(endure, "follow", followed)
    endure._to_its_end(plan, None, {}, 0, print, 0.0, "1", plan.directory)  # type: ignore[arg-type]
    has_free(monkeypatch, FREE - 1)
    assert ["are free" in line for line in seen[0]()] == [True]  # type: ignore[operator]
