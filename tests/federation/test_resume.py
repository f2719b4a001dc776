"""Killed at any point and resumed, a run ends with the bytes of one that never was."""

import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import CliRunner
from typer.main import get_command

from fedlora.cli import app
from fedlora.config.reader import Config
from fedlora.errors import CheckpointError, ClientMemoryError, FedLoraError, LostBaseError
from fedlora.federation.client import memory
from fedlora.reports import line_digest, report
from tests.support.killing import plant
from tests.support.long import few
from tests.support.tiny_federation import ROOT, Ran, federate, quick

Settings = Callable[..., dict[str, object]]


def kill_at(point: str, round: int, given: dict[str, object]) -> None:
    """Run in a process of its own until it is killed there."""
    pid = os.fork()
    if pid == 0:
        try:
            plant(point, round)
            federate(given)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"exit {status}: never came to {point}"
    assert os.WTERMSIG(status) == signal.SIGKILL


CASES = [
    ("fedsa", "mid-client", 2),
    ("fedsa", "half-a-checkpoint", 2),
    ("fedsa", "checkpoint-not-renamed", 2),
    ("fedex", "mid-client", 3),
    ("flora", "first-reply", 3),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("fedsa", "memory-kept", 2),
            ("fedsa", "checkpoint-kept", 2),
            ("fslora", "half-a-line", 2),
            ("fedex", "half-a-checkpoint", 0),
            ("fedsa", "first-reply", 2),
            ("fedsa", "half-a-line", 2),
            ("fedex", "checkpoint-kept", 3),
            ("flora", "half-a-checkpoint", 3),
            ("fslora", "mid-client", 2),
            ("fedsb", "memory-kept", 2),
            ("fedex", "checkpoint-kept", 0),
        )
    ),
]


def partly(name: str, **changes: object) -> dict[str, object]:
    """Two of four clients a round, so that most resume as ones that were away."""
    return quick(name, **{"clients.count": 4, "clients.per-round": 2, "run.rounds": 4, **changes})


def continued(given: dict[str, object]) -> tuple[Ran, list[int]]:
    """The run, resumed to its end, and the rounds that took."""
    rounds: list[int] = []

    def watch(server: Any) -> None:
        server.observer.round_started = lambda number, _: rounds.append(number)

    return federate({**given, "run.resume": True}, before=watch), rounds


def expected_rounds(point: str, round: int) -> list[int]:
    """A round counts as soon as its checkpoint is whole."""
    kept = point in ("checkpoint-kept", "half-a-line")
    return list(range(max(1, round + kept), 5))


@pytest.mark.parametrize(("name", "point", "round"), CASES)
def test_a_run_killed_and_resumed_ends_like_one_that_was_not(
    settings: Settings, name: str, point: str, round: int
) -> None:
    given = settings(**partly(name))
    kill_at(point, round, given)
    ran, trained = continued(given)
    whole = federate({**given, "run.name": "whole"})
    assert trained == expected_rounds(point, round)
    assert ran.adapter == whole.adapter
    assert ran.metrics == whole.metrics
    assert not list(ran.directory.rglob("checkpoint/*.tmp"))


def test_killed_twice_with_two_workers_it_still_ends_the_same(settings: Settings) -> None:
    given = settings(**partly("fedsa", **{"simulate.workers": 2}))
    for n, round in enumerate((2, 3)):
        now = {**given, "run.resume": bool(n)}
        kill_at("checkpoint-kept", round, now)
    ran = federate({**given, "run.resume": True})
    whole = federate({**given, "run.name": "whole"})
    assert ran.adapter == whole.adapter
    assert ran.metrics == whole.metrics


def interrupted(settings: Settings, name: str, **changes: object) -> dict[str, object]:
    """A run that stopped after round 2 of 4."""

    def stop(server: Any) -> None:
        real = server.observer.round_started

        def started(number: int, cohort: list[int]) -> None:
            if number == 3:
                raise KeyboardInterrupt
            real(number, cohort)

        server.observer.round_started = started

    given = settings(**partly(name, **changes))
    with pytest.raises(KeyboardInterrupt):
        federate(given, before=stop)
    return {**given, "run.resume": True}


def test_a_changed_key_is_refused_by_name(settings: Settings) -> None:
    given = interrupted(settings, "fedex")
    changed = {**given, "train.lr": 0.01, "clients.per-round": 3}
    with pytest.raises(CheckpointError) as caught:
        federate(changed)
    assert "train.lr: was 0.05, is 0.01" in str(caught.value)
    assert "clients.per-round: was 2, is 3" in str(caught.value)
    assert "strategy.name" not in str(caught.value)


def test_another_strategy_cannot_take_the_state_over(settings: Settings) -> None:
    given = interrupted(settings, "fedex")
    with pytest.raises(FedLoraError, match=r"strategy\.name: was 'fedex', is 'flora'"):
        federate({**given, "strategy.name": "flora"})


def test_what_is_not_of_the_experiment_may_change(settings: Settings) -> None:
    given = interrupted(settings, "fedex")
    ran = federate({**given, "simulate.workers": 2, "output.keep-updates": True})
    whole = federate({**given, "run.name": "whole", "run.resume": False})
    assert ran.adapter == whole.adapter


def test_a_damaged_last_checkpoint_costs_one_round(settings: Settings) -> None:
    given = interrupted(settings, "fedex")
    directory = Path(str(given["run.out"]), "run")
    newest = sorted((directory / "checkpoint").glob("round-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    ran = federate(given)
    whole = federate({**given, "run.name": "whole", "run.resume": False})
    assert ran.adapter == whole.adapter
    assert ran.metrics == whole.metrics


def test_where_no_checkpoint_can_be_read_nothing_is_begun_anew(settings: Settings) -> None:
    """A resume that silently starts from round 1 would also overwrite what there is."""
    given = interrupted(settings, "fedex")
    directory = Path(str(given["run.out"]), "run")
    lines = (directory / "rounds.jsonl").read_text()
    for path in (directory / "checkpoint").glob("round-*"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"round-00002\.safetensors is damaged"):
        federate(given)
    assert (directory / "rounds.jsonl").read_text() == lines


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def test_a_flipped_bit_in_the_last_checkpoint_costs_one_round(settings: Settings) -> None:
    given = interrupted(settings, "fedex")
    flip(sorted(Path(str(given["run.out"]), "run", "checkpoint").glob("round-*"))[-1])
    said: list[str] = []
    ran = federate(given, before=lambda server: setattr(server.observer, "note", said.append))
    assert any("round-00002.safetensors is damaged" in x and "made again" in x for x in said)
    assert ran.adapter == federate({**given, "run.name": "whole", "run.resume": False}).adapter


@pytest.mark.parametrize("how", ["an older one in its place", "gone"])
def test_a_last_checkpoint_that_is_not_its_rounds_is_said_and_its_round_made_again(
    settings: Settings, how: str
) -> None:
    """Whole as it is: an older backup, say. Without a word a round on record would be undone."""
    given = interrupted(settings, "fedex")
    older, last = sorted(Path(str(given["run.out"]), "run", "checkpoint").glob("round-*"))
    last.unlink()
    if how != "gone":
        shutil.copy(older, last)
    said: list[str] = []
    ran = federate(given, before=lambda server: setattr(server.observer, "note", said.append))
    words = "round 2 is on record, and its checkpoint is gone" if how == "gone" else "holds another"
    assert any(words in x and "made again" in x for x in said)
    assert any("after round 1" in x for x in said)
    assert ran.adapter == federate({**given, "run.name": "whole", "run.resume": False}).adapter


def test_a_flipped_bit_in_a_rounds_record_is_said_by_resume_and_report(settings: Settings) -> None:
    """A number on record that is another one: still JSON, and no run's."""
    given = interrupted(settings, "fedex")
    path = Path(str(given["run.out"]), "run", "rounds.jsonl")
    lines = path.read_bytes()
    at = lines.index(b'"train_loss": ', lines.index(b"\n")) + len(b'"train_loss": ') + 2
    path.write_bytes(lines[:at] + bytes([lines[at] ^ 1]) + lines[at + 1 :])
    for act in (lambda: federate(given), lambda: report.write(path.parent, plots=False)):
        with pytest.raises(FedLoraError, match=r"rounds\.jsonl, line 2: damaged: its digest"):
            act()
    path.write_bytes(lines)
    ran = federate(given)
    assert ran.adapter == federate({**given, "run.name": "whole", "run.resume": False}).adapter
    assert all(line_digest.whole(x) for x in path.read_bytes().splitlines())


def test_a_flipped_bit_in_a_clients_memory_is_said_and_not_trained_on(settings: Settings) -> None:
    given = interrupted(settings, "fedsa", **{"round.min-replies": 2})
    for path in Path(str(given["run.out"]), "run", "clients").rglob("round-*.safetensors"):
        flip(path)
    with pytest.raises(FedLoraError, match=r"lost its memory of round .* its digest is not that"):
        federate(given)


def test_where_all_checkpoints_are_gone_nothing_is_begun_anew(settings: Settings) -> None:
    given = interrupted(settings, "fedex")
    directory = Path(str(given["run.out"]), "run")
    lines = (directory / "rounds.jsonl").read_text()
    shutil.rmtree(directory / "checkpoint")
    with pytest.raises(CheckpointError, match=r"checkpoint is empty, and 3 rounds are on record"):
        federate(given)
    assert (directory / "rounds.jsonl").read_text() == lines


@pytest.mark.parametrize("loss", few(["gone", "damaged"], "damaged"))
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fedex", {}),
        ("fedavg", {"lora.init": "pissa", "clients.ranks": "4"}),
        pytest.param("flora", {}, marks=pytest.mark.slow),
    ],
)
def test_a_client_that_lost_its_base_gets_it_again_in_the_same_round(
    settings: Settings, name: str, changes: dict[str, object], loss: str
) -> None:
    """Its changes, and what the initialisation took out of it; the run's bits are those of one
    where nothing was lost."""
    given = interrupted(settings, name, **changes)
    (base,) = Path(str(given["run.out"]), "run", "clients").glob("*/base")
    for path in base.iterdir():
        flip(path) if loss == "damaged" else path.unlink()
    ran = federate(given)
    assert not any(r["failures"] for r in ran.rounds)
    assert ran.adapter == federate({**given, "run.name": "whole", "run.resume": False}).adapter


def test_a_client_that_always_says_that_it_lacks_its_base_is_left_out(settings: Settings) -> None:
    """And is asked twice in a round, not without end."""
    asked = []

    def lacks(server: Any) -> None:
        real = memory.ClientMemory.base_to

        def base_to(self: Any, number: int) -> Any:
            if self.client == 1 and number:
                asked.append(number)
                raise LostBaseError("it is gone")
            return real(self, number)

        patch.setattr(memory.ClientMemory, "base_to", base_to)

    with pytest.MonkeyPatch.context() as patch:
        ran = federate(settings(**quick("fedex", **{"run.rounds": 3})), before=lacks)
    told = [[(f["client"], f["kind"]) for f in r["failures"]] for r in ran.rounds]
    assert told[2] == told[3] == [(1, "base")]
    assert asked == [1, 1, 2]  # in round 3 it is sent all at once


def test_lost_client_memory_is_said_and_not_made_up(settings: Settings) -> None:
    given = interrupted(settings, "fedsa", **{"round.min-replies": 2})
    shutil.rmtree(Path(str(given["run.out"]), "run", "clients"))
    with pytest.raises(FedLoraError, match="has lost its memory of round") as caught:
        federate(given)
    assert ClientMemoryError.__name__ in str(caught.value)


def test_a_finished_run_resumed_changes_nothing(settings: Settings) -> None:
    given = settings(**partly("fedsa"))
    ran = federate(given)
    adapter, metrics = ran.adapter, ran.metrics
    again = federate({**given, "run.resume": True})
    assert again.adapter == adapter
    assert again.metrics == metrics


def test_resuming_where_nothing_was_begun_begins(settings: Settings) -> None:
    given = settings(**quick("fedex", **{"run.resume": True}))
    assert [r["round"] for r in federate(given).rounds] == [0, 1, 2]


def test_ctrl_c_says_how_to_resume_and_that_works(settings: Settings, tmp_path: Path) -> None:
    changes = {"run.rounds": 300, "train.lr-schedule": "constant", "simulate.workers": 2}
    config = Config.read(settings(**quick("fedex", **changes)))
    (tmp_path / "x.toml").write_text(tomli_w.dumps(config.flat()))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    at_a_terminal = (  # a shell's background job ignores SIGINT, and so would its children
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from fedlora.cli import main; main()"
    )
    command = [sys.executable, "-c", at_a_terminal, "simulate"]
    with subprocess.Popen(
        [*command, str(tmp_path / "x.toml")],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as running:  # fmt: skip
        assert running.stdout
        before = []
        for line in running.stdout:
            before.append(line)
            if "2/300 " in line:
                break
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: workers get it too
        rest = running.stdout.read()
        code = running.wait(60)
    said = "".join([*before, rest])
    directory = tmp_path / "run"
    assert code == 130, said
    assert f"continue with: fedlora simulate --resume {directory}" in rest
    assert "Traceback" not in said
    done = len(Ran(directory).rounds) - 1
    more = ["--set", f"run.rounds={done + 1}", "--quiet"]
    again = CliRunner().invoke(
        get_command(app), ["simulate", "--resume", str(directory), "--workers", "1", *more]
    )
    assert again.exit_code == 0, again.output
    assert [r["round"] for r in Ran(directory).rounds] == list(range(done + 2))
