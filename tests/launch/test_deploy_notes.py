"""What a ServerApp notes beside its rounds reaches whoever follows the run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedlora.launch import server_app
from fedlora.launch.deploy.host import follow
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.watch import ServerWatch
from fedlora.launch.server_notes import noted
from fedlora.launch.server_record import PLACE


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerWatch:
    found = ServerWatch(Plan(tmp_path, 1, (4,)), "7")
    found.place.mkdir(parents=True)
    monkeypatch.setenv(PLACE, str(found.place))
    return found


def test_each_note_is_said_once_in_one_line_that_prints(watch: ServerWatch) -> None:
    assert [*watch.notes()] == []
    (keeps,) = noted(7)
    keeps.note("round-00003 is damaged; that round is made again")
    assert [*watch.notes()] == ["round-00003 is damaged; that round is made again"]
    keeps.note("node 5 was not taken in: \x1b[2J\nround 9, accuracy 0.99")
    (line,) = watch.notes()
    assert line.isprintable()
    assert [*watch.notes()] == []


def test_half_a_line_waits_for_its_end_and_a_damaged_one_is_passed_over(
    watch: ServerWatch,
) -> None:
    path = watch.place / "7.notes"
    path.write_text('"who"')
    assert [*watch.notes()] == []
    path.write_text('"who"\n{{\n"le"\n')
    assert [*watch.notes()] == ["who", "le"]


def test_without_a_place_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLACE, raising=False)
    assert noted(7) == []


def test_the_serverapp_keeps_its_notes(
    watch: ServerWatch, monkeypatch: pytest.MonkeyPatch, settings: Callable[..., dict[str, object]]
) -> None:
    class Ran:
        def __init__(self, _config: object, observer: object) -> None:
            self.observer = observer

        def start(self, _grid: object) -> None:
            self.observer.note("as it is")  # type: ignore[attr-defined]

    monkeypatch.setattr(server_app, "Federation", Ran)
    context = SimpleNamespace(run_config=settings(), run_id=7)
    server_app.app._main(None, context)  # type: ignore[misc, arg-type]
    assert [*watch.notes()] == ["as it is"]
    assert (watch.place / "7.done").exists()


def test_a_run_that_went_back_says_the_round_that_it_made_again(tmp_path: Path) -> None:
    """It was "round 4 under way", and the new round 3 was never said."""
    line = {"accepted": [], "cohort": [], "failures": [], "seconds": {"total": 1.0}}
    kept = [json.dumps({**line, "round": r}) + "\n" for r in range(4)]
    steps = iter([kept, kept[:3], kept, kept])
    statuses = iter(["running", "waiting", "running", "finished:completed"])
    said: list[str] = []

    def status(_: str) -> str:
        (tmp_path / "rounds.jsonl").write_text("".join(next(steps)))
        return next(statuses)

    (tmp_path / "config.toml").write_text("[run]\nrounds = 9\n")
    follow(SimpleNamespace(status=status), "1", tmp_path, said.append, 0.0)  # type: ignore[arg-type]
    assert [x.split(",")[0] for x in said if x.startswith("round")] == [
        "round 0", "round 1", "round 2", "round 3", "round 3",
    ]  # fmt: skip
    assert any("waiting, round 3 under way" in x for x in said)


def test_a_run_that_is_gone_on_with_is_after_the_round_that_it_has(tmp_path: Path) -> None:
    """With all its rounds on record it was "after the last round", while its model was loaded."""
    line = {"accepted": [], "cohort": [], "failures": [], "seconds": {"total": 1.0}, "round": 0}
    (tmp_path / "rounds.jsonl").write_text(f"{json.dumps(line)}\n")
    (tmp_path / "config.toml").write_text("[run]\nrounds = 0\n")
    statuses = iter(["running", "waiting", "finished:completed"])
    said: list[str] = []
    follow(SimpleNamespace(status=lambda _: next(statuses)), "1", tmp_path, said.append, 0.0)  # type: ignore[arg-type]
    assert [x.partition(", ")[2] for x in said if " s: " in x] == ["on after round 0"] * 3
