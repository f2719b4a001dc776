"""`make gpu`: its record, its verdicts and what it skips, with rows that stand in for others."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu, gpu_rows, gpu_speed
from benchmarks.gpu import Part, Record
from benchmarks.gpu_rows import SIZES, SMALL, Bench, SkippedError
from benchmarks.gpu_speed import Side, compared
from benchmarks.measure import Row
from fedlora.training import devices

ROOT = Path(__file__).parents[2]
Rows = Callable[[Bench], Iterator[Row]]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, devices.HOST, tiny=True)


def record(path: Path, device: str = "a card", fresh: bool = False, **settings: Any) -> Record:
    return Record.at(path, device, settings, fresh)


def stand_in(
    name: str, calls: list[str], *values: float, then: BaseException | None = None
) -> Part:
    """A part of these rows, each to be at most 1, that ends as told; a call is noted."""

    def rows(_: Bench) -> Iterator[Row]:
        calls.append(name)
        for x in values:
            yield Row(f"{name} {x}", x, "<= 1", "made up")
        if then is not None:
            raise then

    return Part(name, rows)


def test_parts_are_in_the_order_of_what_matters_most() -> None:
    names = [part.name.split()[0].strip(",") for part in gpu.parts(["0.5b", "8b"])]
    groups = list(dict.fromkeys("speed" if n in ("DP", "certificate") else n for n in names))
    assert groups == ["equality", "resume", "memory", "speed", "quantised"]


def test_a_cut_run_goes_on_with_the_part_it_was_cut_in(bench: Bench, tmp_path: Path) -> None:
    path, calls = tmp_path / "gpu.json", list[str]()
    cut = [
        stand_in("a", calls, 0.5),
        stand_in("b", calls, 0.25, then=KeyboardInterrupt()),
        stand_in("c", calls, 0.5),
    ]
    with pytest.raises(KeyboardInterrupt):
        gpu.measure(cut, bench, record(path))
    ended = {x["part"]: (x["ended"], len(x["rows"])) for x in json.loads(path.read_text())["parts"]}
    assert ended == {"a": ("done", 1), "b": ("cut", 1)}

    calls.clear()
    whole = [stand_in(x, calls, 0.5) for x in "abc"]
    assert gpu.measure(whole, bench, record(path))
    assert calls == ["b", "c"]
    found = json.loads(path.read_text())["parts"]
    assert [(x["part"], x["ended"], len(x["rows"])) for x in found] == [
        (x, "done", 1) for x in "abc"
    ], "rows of the cut part are not kept beside the new ones"


@pytest.mark.parametrize(
    "changes", [{"device": "another"}, {"budget": 5.0}, {"fresh": True}], ids=str
)
def test_what_was_measured_otherwise_is_measured_anew(
    changes: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    path, calls = tmp_path / "gpu.json", list[str]()
    for given in ({}, {}, changes):
        gpu.measure([stand_in("a", calls, 0.5)], bench, record(path, **{"budget": 1.0, **given}))
    assert calls == ["a", "a"]


@pytest.mark.parametrize(
    ("then", "ended", "verdict"),
    [
        (
            SkippedError("needs a package on a card"),
            "skipped",
            "skipped: needs a package on a card",
        ),
        (devices.OutOfMemory("full"), "skipped", "skipped: the card's memory does not suffice"),
        (ValueError("what"), "failed", "FAILED    failed: ValueError: what"),
    ],
)
def test_a_part_without_an_end_is_named_and_tried_again_and_holds_up_no_other(
    then: Exception,
    ended: str,
    verdict: str,
    bench: Bench,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, calls = tmp_path / "gpu.json", list[str]()
    todo = [stand_in("a", calls, then=then), stand_in("b", calls, 0.5)]
    assert gpu.measure(todo, bench, record(path)) is (ended == "skipped")
    assert verdict in capsys.readouterr().out
    assert [x["ended"] for x in json.loads(path.read_text())["parts"]] == [ended, "done"]
    gpu.measure(todo, bench, record(path))
    assert calls == ["a", "b", "a"]


def test_each_row_has_a_verdict_and_a_missed_target_is_the_runs(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    todo = [
        stand_in("a", [], 0.5, 2.0),
        Part("b", lambda _: iter([Row("b", 3.0, "", "no target")])),
    ]
    for _ in range(2):  # measured, and read from the record
        assert not gpu.measure(todo, bench, record(path))
        lines = capsys.readouterr().out.splitlines()
        verdicts = [re.search(r"(yes|NO|recorded) ", x) for x in lines if not x.startswith("[")]
        assert [x and x[1] for x in verdicts] == ["yes", "NO", "recorded"]


def test_clients_beyond_the_measured_ones_are_a_linear_repeat_and_said_to_be(bench: Bench) -> None:
    own, theirs = Side([5.0, 1.0, 2.0], tokens=100, most=3), Side([10.0, 12.0], tokens=100, most=4)
    rows = {row.name: row for row in compared(bench, "speed", own, theirs, "theirs", 0)}
    four = rows["speed, 4 clients: ours / theirs"]
    assert four.value == pytest.approx((10 + 12 + 2 * 12) / (5 + 1 + 2 + 1.5))
    assert "2 measured, the others a linear repeat" in four.how
    assert "linear" not in rows["speed, 1 client: ours / theirs"].how
    assert rows["speed, 64 clients: clients an hour, ours"].value == pytest.approx(
        3600 * 64 / (8 + 61 * 1.5)
    )
    assert rows["speed, 1 client: tokens a second, theirs"].value == 10.0


@pytest.mark.parametrize(("kind", "package"), gpu_speed.KINDS.items())
def test_a_quantised_row_is_skipped_by_its_packages_name(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_speed, "find_spec", lambda name: None)
    with pytest.raises(SkippedError, match=f"needs {package} on a card"):
        next(gpu_speed.quantised(Bench(tmp_path, devices.HOST), "0.5b", kind))


def test_a_base_that_the_card_or_the_disk_has_no_room_for_is_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, devices.HOST)
    numbers = gpu_rows.weights(SIZES["8b"])
    assert 7.9e9 < numbers < 8.1e9
    room = devices.Memory(30 * 10**9, 80 * 10**9)
    monkeypatch.setattr(devices, "memory_of", lambda _: room)
    with pytest.raises(SkippedError, match="8b needs 35 GB of the card, 30 are free"):
        bench.large("8b")
    monkeypatch.setattr(devices, "memory_of", lambda _: devices.Memory(room.total, room.total))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9e9))
    with pytest.raises(SkippedError, match="8b needs 18 GB of disk, 9 are free"):
        bench.large("8b")
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_base_has_as_many_weights_as_are_reckoned_with(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = gpu_rows.written(tmp_path, SMALL, 12, 8)
    base = AutoModelForCausalLM.from_pretrained(settings("x")["model.path"])
    norms = sum(p.numel() for p in base.parameters() if p.ndim == 1)
    assert sum(p.numel() for p in base.parameters()) - norms == gpu_rows.weights(SMALL)


@pytest.mark.slow
def test_every_part_runs_to_its_end_on_a_pretend_card_or_is_skipped_by_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [x["part"] for x in found] == [part.name for part in gpu.parts(["0.5b"])]
    for part in found:
        quantised = part["part"].startswith("quantised")
        assert part["ended"] == ("skipped" if quantised else "done"), part
    for kind, package in gpu_speed.KINDS.items():
        assert re.search(rf"quantised 0.5b, {kind} .*needs {package} on a card", done.stdout)
