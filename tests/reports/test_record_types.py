"""Whatever stands in a file of a run's directory, it is read right or named in one line."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import FedLoraError
from fedlora.launch.compare.experiment import Cell
from fedlora.launch.compare.row import row
from fedlora.launch.run import Run
from fedlora.reports import report
from fedlora.reports.model_card import CardFacts, card
from fedlora.reports.plots import draw
from fedlora.reports.run_files import read
from tests.conftest import tiny_settings
from tests.support.tiny_federation import federate, quick

OTHERS: list[Any] = [
    None, 3, -1.5, 10**400, True, "x", "", [], [3], ["x"], [[]], {}, {"a": 3}, {"1": "x"},
]  # fmt: skip
FILES = ("rounds.jsonl", "clients.jsonl", "summary.json")
FACTS = CardFacts("base", merged=False, labels=(), load="", use="", checked=())


@pytest.fixture(scope="module")
def directory(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has every kind of record: proofs, certificates, a virtual clock, failures."""
    changes = {"evaluate.clients": True, "evaluate.every": 1, "devices.classes": "fast:1:100",
               "clients.count": 2}  # fmt: skip
    out = tmp_path_factory.mktemp("records")
    ran = federate(tiny_settings(tiny, out, "float32", **quick("fedex", **changes)))
    found, lines = ran.directory, ran.rounds
    lines[-1] |= {"secure": {"summed": 2}, "loss_not_finite": [1]}
    lines[-1]["failures"] = [{"client": 1, "reason": "late"}]
    (found / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    summary = json.loads((found / "summary.json").read_text())
    summary["baselines"] = {"majority class": {"accuracy": 0.4, "macro_f1": None}}
    summary["rows"]["sources"][0]["left"] = [{"why": "equal", "rows": 1, "first": [3]}]
    summary["generation"] = {"greedy": True, "tokens": 3, "stops_at": "[EOS]"}
    (found / "summary.json").write_text(json.dumps(summary))
    return found


def changed(x: Any) -> Iterator[tuple[Any, list[str]]]:
    """The record with another value at each of its places: one entry of each list or table."""
    for value in OTHERS:
        yield value, []
    if isinstance(x, dict):
        for key in x:
            yield {k: v for k, v in x.items() if k != key}, [key]
            if list(x).index(key) and all(type(v) is type(x[key]) for v in x.values()):
                continue
            yield from (({**x, key: y}, [key, *path]) for y, path in changed(x[key]))
        yield {**x, "\u00e9[/red]": 3}, []
    if isinstance(x, list) and x:
        yield from (([*x[:-1], y], [str(len(x) - 1), *path]) for y, path in changed(x[-1]))


def shown(run: Path) -> None:
    """All that reads a run's records back, but for its figures."""
    found = read(run)
    report.render(found, {})
    report.summary_table(run)
    card(found, FACTS)
    row("", "fedex", "exact", [run])
    repr(Run(run))
    Cell("", "fedex", 0, run).done  # noqa: B018


def damage(directory: Path, tmp_path: Path, file: str) -> Iterator[tuple[Path, list[str]]]:
    """The run with one value changed after the other, and where."""
    run = Path(shutil.copytree(directory, tmp_path / "damaged", ignore=lambda *_: ["checkpoint"]))
    text = (run / file).read_text()
    lines = [text] if file == "summary.json" else text.splitlines()
    records = [json.loads(line) for line in lines]
    for new, path in changed(copy.deepcopy(records[-1])):
        (run / file).write_text("\n".join(json.dumps(r) for r in [*records[:-1], new]) + "\n")
        yield run, path


def outcome(what: Callable[[], object], run: Path, file: str) -> bool:
    """Whether it went well; where it did not, one line said so, and named the file."""
    said = ""
    try:
        what()
    except FedLoraError as e:
        said = str(e)
    assert not said or str(run / file) in said, said
    assert "\n" not in said, said
    return not said


def told(directory: Path, tmp_path: Path, file: str, every: int) -> list[bool]:
    """Of every so-manieth damage, whether the run was shown."""
    found = []
    for n, (run, _) in enumerate(damage(directory, tmp_path, file)):
        if n % every == 0:
            found.append(outcome(partial(shown, run), run, file))
    return found


@pytest.mark.parametrize("file", FILES)
def test_a_value_of_another_kind_is_shown_or_named_with_its_file(
    directory: Path, tmp_path: Path, file: str
) -> None:
    assert len({*told(directory, tmp_path, file, 61)}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_more_values_of_another_kind_are_shown_or_named_with_their_file(
    directory: Path, tmp_path: Path, file: str
) -> None:
    """Its figures as well, of some."""
    assert len({*told(directory, tmp_path, file, 5)}) == 2
    for n, (run, _) in enumerate(damage(directory, tmp_path / "drawn", file)):
        if n % 29 == 0:
            outcome(lambda run=run: draw(read(run)), run, file)
