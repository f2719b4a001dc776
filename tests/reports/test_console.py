"""The console says what a run does in lines a log can hold, and silences only what it names."""

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.reports.console import (
    Observer,
    Progress,
    Silent,
    shown,
)
from fedlora.training.quiet import _worth_reading, quiet_libraries


def record(number: int, **more: Any) -> dict[str, Any]:
    """A round's line of rounds.jsonl: round 0 has no cohort; client 7 fails round 3."""
    cohort = list(range(8)) if number else []
    failed = [7] if number == 3 else []
    reason = "no reply before the deadline"
    return {
        "round": number,
        "seconds": {"total": 12.25},
        "train_loss": 1 / number if number else float("nan"),
        "evaluation": {"loss": 2 / (number + 1), "accuracy": number / 10, "examples": 500},
        "cohort": cohort,
        "accepted": [c for c in cohort if c not in failed],
        "failures": [{"client": c, "round": number, "reason": reason} for c in failed],
        "clients": {str(c): {"train_loss": 0.5} for c in cohort if c not in failed},
        "bytes": {"down": 4_830_000, "up": 2_590_000},
        "proof": {"deviation": 3.3e-8} if number else None,
        **more,
    }


ROUNDS = [record(n) for n in range(7)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(observer: Observer, rounds: list[dict[str, Any]]) -> None:
    """Tell an observer a whole run, as the server does."""
    observer.baseline("majority class", {"accuracy": 0.2})
    for r in rounds:
        if r["round"]:
            observer.round_started(r["round"], r["cohort"])
        for client, found in r["clients"].items():
            observer.client_done(int(client), found)
        for f in r["failures"]:
            observer.client_failed(f["client"], f["reason"])
        observer.round_done(r)


def test_away_from_a_terminal_a_round_is_one_line_without_escape_codes() -> None:
    attack = "\x1b[2J\x07boom\r\nline two \u202e [bold]" + "x" * 500
    rounds = [*ROUNDS]
    rounds[3] = record(3, failures=[{"client": 7, "round": 3, "reason": attack}])
    rounds[4] = record(4, failures=[{"client": i, "reason": "r"} for i in range(7)])
    stream = io.StringIO()
    with Progress(6, stream) as progress:
        play(progress, rounds)
    told = stream.getvalue().splitlines()
    assert len(told) == 1 + 7
    assert all(c.isprintable() for line in told for c in line)
    assert told[0] == "baseline  majority class: accuracy 20.0%"
    assert told[1] == "round 0/6  test loss 2.0000  accuracy 0.0%  12.2 s"
    assert told[3] == (
        "round 2/6  train loss 0.5000  test loss 0.6667  accuracy 20.0%  clients 8/8  "
        "down 4.83 MB  up 2.59 MB  deviation 3.3e-08  12.2 s"
    )
    assert "; client 7 failed: [2J boom line two [bold]xxx" in told[4]
    assert len(told[4]) < 400
    assert told[5].endswith("client 2 failed: r; 4 more failed")


def test_a_stream_that_knows_only_ascii_gets_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Progress(1, stream).note("caf\u00e9 \ud800")
    assert raw.getvalue() == b"caf\\xe9  \n"


def test_on_a_terminal_finished_rounds_stand_above_a_bar_that_goes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with Progress(6, stream) as progress:
        play(progress, ROUNDS)
    told = stream.getvalue()
    assert told.count("round 6/6  train loss") == 1
    assert "round 3: client 7 failed: no reply before the deadline" in told
    assert "clients 8/8" in told
    assert "\x1b[2K" in told  # the bar was wiped


def test_the_time_left_is_estimated_from_the_finished_rounds() -> None:
    now = [0.0]
    progress = Progress(10, io.StringIO(), clock=lambda: now[0])
    assert progress.seconds_left() is None
    for number, seconds in ((4, 30.0), (5, 50.0)):  # resumed: rounds 1 to 3 were another day
        progress.round_started(number, [0, 1])
        progress.round_done({"round": number, "cohort": [0, 1], "seconds": {"total": seconds}})
    assert progress.seconds_left() == 5 * 40
    progress.round_started(6, [0, 1])
    now[0] += 15
    assert progress.seconds_left() == 5 * 40 - 15
    now[0] += 1000  # a round that drags on: what is left is at least the rounds after it
    assert progress.seconds_left() == 4 * 40


def test_paths_below_the_working_directory_are_printed_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    Progress(1, stream).note(f"wrote {tmp_path}/runs/a, not /x{tmp_path}/runs/a")
    assert stream.getvalue() == f"wrote runs/a, not /x{tmp_path}/runs/a\n"
    monkeypatch.chdir("/")
    assert shown("/etc/hosts") == "/etc/hosts"


def test_silent_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Silent() as silent:
        play(silent, ROUNDS)
    assert capsys.readouterr() == ("", "")


def test_importing_the_console_leaves_the_slow_imports_for_later() -> None:
    slow = "{'rich', 'torch', 'numpy', 'matplotlib', 'flwr', 'transformers'}"
    code = f"import sys, fedlora.reports.console; print({slow} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# -- other libraries ------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """quiet_libraries() for one test, taken back after it."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    names = ("transformers.modeling_utils", "transformers.utils.loading_report", "flwr")
    with warnings.catch_warnings():
        quiet_libraries()
        quiet_libraries()  # twice is once
        yield
    for name in names:
        assert logging.getLogger(name).filters.count(_worth_reading) == 1
        logging.getLogger(name).removeFilter(_worth_reading)


REPORT = "\x1b[1mBertModel LOAD REPORT\x1b[0m from: x\nKey | Status |  |\n---+---+---\n"


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("rows", "heard"),
    [
        ("classifier.weight | MISSING |\nclassifier.bias | MISSING |", False),
        ("cls.predictions.bias | UNEXPECTED |  |\nscore.weight | \x1b[31mMISSING\x1b[0m |", False),
        ("classifier.weight | MISSING |\nbert.pooler.dense.weight | MISSING |", False),
        ("classifier.weight | MISMATCH | Reinit", True),
    ],
)
def test_a_load_report_of_what_is_trained_or_left_out_is_silenced(rows: str, heard: bool) -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    record = logger.makeRecord(logger.name, logging.WARNING, "f", 1, REPORT + rows, (), None)
    assert bool(logger.filter(record)) == heard


@pytest.mark.usefixtures("quiet")
def test_flowers_warnings_are_heard_and_its_notes_are_not() -> None:
    logger = logging.getLogger("flwr")
    levels = {logging.INFO: False, logging.WARNING: True, logging.ERROR: True}
    for level, heard in levels.items():
        record = logger.makeRecord("flwr", level, "f", 1, "text", (), None)
        assert bool(logger.filter(record)) == heard


@pytest.mark.usefixtures("quiet")
def test_only_the_named_warnings_are_silenced() -> None:
    warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, 2)
    with pytest.raises(FutureWarning):
        warnings.warn("`something_else` is deprecated", FutureWarning, 2)


def test_a_progress_bar_that_the_user_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    with warnings.catch_warnings():
        quiet_libraries()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
