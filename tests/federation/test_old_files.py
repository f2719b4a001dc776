"""Runs that an older fedlora left on disk go on, and what none can read says so by its name."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.main import get_command

from fedlora.cli import app
from fedlora.errors import CheckpointError, ClientMemoryError, FormatError
from fedlora.federation.client.memory import ClientMemory
from fedlora.federation.server.journal import OLDER, Member, Saved, state_types
from fedlora.lora.adapter import Factors, Pair, Stack
from fedlora.lora.tree_digest import EMPTY, seal
from fedlora.lora.tree_file import KNOWN, load, notes, save
from fedlora.lora.tree_format import FORMAT, Names, numbered, renamed
from fedlora.reports.run_files import breaks_certificate, breaks_promise, read
from fedlora.reports.units import number
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Client, Layer, Version
from fedlora.strategies.base_log import BaseLog
from fedlora.strategies.server_optimizers import Moments
from tests.support.long import few
from tests.support.strategy_federation import fitting, play
from tests.support.tiny_federation import ROOT, Ran, read_tensors

OLD = ROOT / "tests" / "data" / "e8f4be2"
"""Written by tests/data/write_old_runs.py with the code of that commit."""
RUNS = sorted(path.name for path in (OLD / "stopped").iterdir())
CLOSE = 1e-4
"""Of a change's norm. Float32 sums differ by some 1e-7 from processor to processor, and four short
rounds of SGD make up to 1e-6 of it, 1e-5 where the server divides by a small root (fedadam). A
round lost or a scale misread is of the order of 1."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stopped runs to work on, with their base and rows, as working directory."""
    shutil.copytree(OLD / "stopped", tmp_path, dirs_exist_ok=True)
    shutil.copytree(OLD / "base", tmp_path / "base")
    shutil.copy(OLD / "rows.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fedlora(*arguments: str) -> str:
    """What the command prints; it must succeed."""
    done = CliRunner().invoke(get_command(app), arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def resume(name: str) -> Ran:
    fedlora("simulate", "--resume", name, "--workers", "1", "--quiet")
    return Ran(Path(name))


def change(adapter: Path) -> dict[str, Tensor]:
    """What a PEFT directory adds to each weight: B A, where A and B alone depend on their gauge."""
    found = load_file(adapter / "adapter_model.safetensors")
    whole = {k: x.double() for k, x in found.items() if ".lora_" not in k}
    for key in [k for k in found if k.endswith(".lora_A.weight")]:
        A, B = found[key], found[key.replace("lora_A", "lora_B")]
        whole[key] = B.double() @ A.double()  # (d, k)
    return whole


def distance(one: Path, other: Path) -> float:
    """The largest relative distance of two adapters, module by module."""
    x, y = change(one), change(other)
    assert x.keys() == y.keys()
    assert len(x) >= 6
    return max(float((x[k] - y[k]).norm() / y[k].norm()) for k in y)


def checkpoint_of(run: Path) -> Path:
    (path,) = (run / "checkpoint").iterdir()
    return path


def tree_in(path: Path) -> dict[str, Any]:
    """What the file's metadata says, as it lies there."""
    found: dict[str, Any] = json.loads(read_tensors(path)[1]["tree"])
    return found


def types_of(name: str) -> list[type]:
    return [Saved, Member, *state_types(STRATEGIES[name]())]


@pytest.mark.parametrize("name", few(RUNS, *RUNS[::2]))
def test_an_old_run_goes_on_to_where_the_old_code_took_it(name: str, old: Path) -> None:
    """Its new rounds have what the old code did not write, and its new files today's format."""
    ran = resume(name)
    assert distance(ran.directory / "adapter", OLD / "finished" / name / "adapter") < CLOSE
    *before, third, fourth = ran.rounds
    assert [r["round"] for r in before] == [0, 1, 2]
    assert not any(r.get("certificate") for r in before)
    for record in (third, fourth):
        promise = record["proof"]["promise"]
        assert not breaks_promise(record["proof"])
        assert record["certificate"]["layers"]
        assert not breaks_certificate(record["certificate"], promise)
        assert not record["failures"]
    newest = sorted((ran.directory / "checkpoint").iterdir())[-1]
    assert tree_in(newest)["format"] == FORMAT
    load(newest, *types_of(read(old / name).config["strategy.name"]))


def test_a_resumed_run_says_which_older_rule_it_keeps(old: Path) -> None:
    said = " ".join(fedlora("simulate", "--resume", "lora-a2", "--workers", "1").split())
    assert "strategy.lora-a2.choice = 'server-0.1': this run began before there was the key" in said
    assert read(old / "lora-a2").config["strategy.lora-a2.choice"] == "server-0.1"
    again = fedlora("simulate", "--resume", "fedex", "--workers", "1")
    assert "began before there was the key" not in again


@pytest.mark.parametrize("way", ["peft", "merged"])
@pytest.mark.parametrize("name", few(RUNS, *RUNS[::3]))
def test_an_old_run_is_exported(name: str, way: str, old: Path) -> None:
    said = fedlora("export", name, "--out", "out", "--as", way)
    assert "logits equal the federated model's to" in said
    if way == "peft":  # after round 2 of 4: what it ends with is another
        assert distance(old / "out", OLD / "finished" / name / "adapter") > 100 * CLOSE


def test_a_clients_own_model_is_exported_from_its_old_memory(old: Path) -> None:
    said = fedlora("export", "fedsa", "--out", "out", "--client", "1")
    assert "logits equal the federated model's to" in said


@pytest.mark.parametrize(
    ("name", "stage"), [("fedex", "finished"), *((name, "stopped") for name in RUNS)]
)
def test_an_old_run_is_reported(name: str, stage: str, tmp_path: Path) -> None:
    shutil.copytree(OLD / stage / name, tmp_path / name)
    fedlora("report", str(tmp_path / name))
    page = (tmp_path / name / "report.html").read_text()
    run = read(tmp_path / name)
    assert run.config["run.name"] in page
    assert len(run.clients) == 3 or name == "buffered"  # whose third has not come yet
    assert run.complete == (stage == "finished")
    for record in run.trained:
        assert number(record["train_loss"]) in page


@pytest.mark.parametrize("name", RUNS)
def test_all_that_an_old_checkpoint_holds_is_taken_over(name: str) -> None:
    path = checkpoint_of(OLD / "stopped" / name)
    strategy = read(OLD / "stopped" / name).config["strategy.name"]
    was = tree_in(path)["fields"]
    found = load(path, *types_of(strategy), older=OLDER)
    assert isinstance(found, Saved)
    assert found.token == was["token"]
    assert len(found.members) == len(was["members"]["map"]) == 3
    assert len(found.base_offset) == len(was["origin"]["map"]) == (6 if name == "pissa" else 0)
    assert bool(found.buffer) == (name == "buffered")
    assert was["finished"] is False


def test_without_its_map_an_old_checkpoint_is_refused(tmp_path: Path) -> None:
    """The map is what reads it: a field that nobody names is never passed over."""
    path = checkpoint_of(OLD / "stopped" / "fedex")
    with pytest.raises(FormatError, match=r"round-00002\.safetensors holds Saved\.finished"):
        load(path, *types_of("fedex"))
    half = {1: dataclasses.replace(OLDER[1], fields={})}
    with pytest.raises(FormatError, match=r"Saved\.origin, and a Saved has no such field"):
        load(path, *types_of("fedex"), older=half)


NAMES = {
    "Factors": "scale A B R other",
    "Pair": "A B scale",
    "Stack": "A B scale centre",
    "Version": "number delta snapshot",
    "BaseLog": "versions",
    "Client": "id layers base_version has_memory",
    "Layer": "d k rank scale",
    "Moments": "m v",
    "Saved": "token state members baselines seconds clock moments clip base_offset buffer best",
    "Member": "id rank memory_round last_round base_version rounds failures offences bytes_down "
    "bytes_up examples first personal final plan timing cap personalized alone "
    "microbatch ledger charges",
    "fedex.State": "factors base",
    "flora.State": "other base",
    "hetlora.State": "factors ranks real",
    "flexlora.State": "mean fresh other",
    "raflora.State": "mean fresh other",
    "florist.State": "mean fresh other",
    "lora-a2.State": "factors scores",
    "frlora.State": "factors base",
}
"""The names on disk in today's format."""
FORMAT_OF_NAMES = 3
EVERYWHERE = (Factors, Pair, Stack, Version, BaseLog, Client, Layer, Moments, Saved, Member)


def classes(tree: Any) -> Iterator[type]:
    """The classes of the dataclasses in a tree."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        yield type(tree)
        tree = [getattr(tree, f.name) for f in dataclasses.fields(tree)]
    for x in tree.values() if isinstance(tree, Mapping) else tree:
        if isinstance(x, Mapping | tuple | list) or dataclasses.is_dataclass(x):
            yield from classes(x)


def names_now() -> dict[str, set[str]]:
    """Of every strategy's state after two rounds, and of what is beside it."""
    found: dict[str, type] = {cls.__name__: cls for cls in EVERYWHERE}
    for name, cls in STRATEGIES.items():
        strategy: Any = cls()
        *_, last = play(strategy, fitting(strategy), [(0, 1, 2), (3, 0)])
        mine = {c for c in classes(last.after) if c not in EVERYWHERE}
        found |= {f"{name}.{c.__name__}": c for c in mine}
    return {key: {f.name for f in dataclasses.fields(cls)} for key, cls in found.items()}


def test_no_name_on_disk_changes_without_the_formats_number() -> None:
    """A new field, with a default, joins NAMES. A name that changes or goes takes FORMAT + 1, the
    old one in OLDER (or in the map of who owns the class), and NAMES anew."""
    assert FORMAT == FORMAT_OF_NAMES
    assert names_now() == {key: set(fields.split()) for key, fields in NAMES.items()}


def test_every_name_of_the_first_format_is_of_today_or_in_the_map() -> None:
    told = json.loads((OLD / "names.json").read_text())
    for strategy, found in told.items():
        types = {t.__name__: t for t in (*KNOWN, *types_of(strategy or "fedex"))}
        for old_name, fields in found.items():
            name, values = renamed(old_name, dict.fromkeys(fields), (OLDER[1],))
            assert values.keys() <= {f.name for f in dataclasses.fields(types[name])}, name


def test_the_map_names_nothing_that_never_was() -> None:
    told = json.loads((OLD / "names.json").read_text()).values()
    was = {f"{c}.{f}" for found in told for c, fields in found.items() for f in fields}
    assert {*OLDER[1].fields, *OLDER[1].dropped} <= was


@dataclasses.dataclass(frozen=True)
class Box:
    size: int
    label: str = "none"


def rewritten(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Give a file another tree."""
    tensors, metadata = read_tensors(path)
    metadata["tree"] = json.dumps(edit(json.loads(metadata["tree"])))
    save_file(tensors, path, metadata=metadata)
    if EMPTY in metadata["tree"]:
        seal(path)


def of_format(number: object) -> Callable[[dict[str, Any]], object]:
    return lambda found: {"format": number, "tree": found.get("tree", found)}


def holding(tree: object) -> Callable[[dict[str, Any]], object]:
    return lambda _: numbered(tree)


def box(fields: Mapping[str, object], name: str = "Box") -> object:
    return {"type": name, "fields": fields}


@pytest.fixture
def boxed(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    save(path, (Box(3), torch.ones(2)), {"round": "3"})
    return path


def test_a_file_says_its_format_and_notes_stay_the_callers(boxed: Path) -> None:
    assert tree_in(boxed)["format"] == FORMAT
    assert notes(boxed) == {"round": "3"}


def test_a_newer_fedloras_file_is_refused_and_says_so(boxed: Path) -> None:
    rewritten(boxed, of_format(99))
    for reading in (lambda: load(boxed, Box), lambda: notes(boxed)):
        with pytest.raises(FormatError, match="has format 99, written by a newer") as caught:
            reading()
        assert str(boxed) in str(caught.value)
        assert f"reads up to format {FORMAT}. Use the fedlora that wrote it" in str(caught.value)


@pytest.mark.parametrize("number", ["2", "two", 2.0, True, None, 0, 1, -3])
def test_a_format_that_is_no_number_is_damage(boxed: Path, number: object) -> None:
    rewritten(boxed, of_format(number))
    for reading in (lambda: load(boxed, Box), lambda: notes(boxed)):
        with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
            reading()


def test_an_unknown_class_is_refused_by_name(boxed: Path) -> None:
    rewritten(boxed, holding(box({"size": 3}, "Crate")))
    with pytest.raises(FormatError, match=r"x\.safetensors holds a Crate, which this run has no"):
        load(boxed, Box)


def test_an_unknown_field_is_refused_by_name(boxed: Path) -> None:
    rewritten(boxed, holding(box({"size": 3, "weight": 1})))
    with pytest.raises(FormatError, match=r"x\.safetensors holds Box\.weight, and a Box has no"):
        load(boxed, Box)


def test_a_field_that_must_be_there_is_named_and_one_with_a_default_takes_it(boxed: Path) -> None:
    rewritten(boxed, holding(box({"label": "a"})))
    with pytest.raises(FormatError, match="holds a Box without its size"):
        load(boxed, Box)
    rewritten(boxed, holding(box({"size": 3})))
    assert load(boxed, Box) == Box(3, "none")


def test_what_an_older_format_dropped_is_refused_in_todays(old: Path) -> None:
    """`finished` is a word of format 1; in a file of format 2 it is unknown like any other."""
    path = checkpoint_of(old / "fedex")
    load(path, *types_of("fedex"), older=OLDER)
    rewritten(path, of_format(2))
    with pytest.raises(FormatError, match=r"holds Saved\.finished"):
        load(path, *types_of("fedex"), older=OLDER)


def test_a_class_a_field_and_what_is_gone_are_read_under_todays_names(boxed: Path) -> None:
    older = {
        1: Names({"Crate": "Box"}, {"Crate.width": "size"}, frozenset({"Crate.weight"})),
    }
    tree = box({"width": 4, "weight": 9, "label": "b"}, "Crate")
    rewritten(boxed, lambda _: tree)
    assert load(boxed, Box, older=older) == Box(4, "b")
    rewritten(boxed, holding(tree))
    with pytest.raises(FormatError, match="holds a Crate"):
        load(boxed, Box, older=older)


def test_a_file_goes_through_the_names_of_every_format_between() -> None:
    """Each map speaks of its own format's names; a name may come back with another meaning."""
    first = Names({"A": "B"}, {"A.x": "y"}, frozenset({"A.z"}))
    second = Names({"B": "C"}, {"B.y": "x", "A.x": "never"}, frozenset({"B.w"}))
    assert renamed("A", {"x": 1, "z": 2, "w": 3}, (first, second)) == ("C", {"x": 1})
    assert renamed("B", {"y": 1, "z": 2}, (second,)) == ("C", {"x": 1, "z": 2})


def test_two_fields_may_change_places() -> None:
    turned = Names(fields={"A.x": "y", "A.y": "x"})
    assert renamed("A", {"x": 1, "y": 2}, (turned,)) == ("A", {"y": 1, "x": 2})


def test_a_newer_checkpoint_is_not_passed_over_for_an_older_one(old: Path) -> None:
    """Unlike a damaged one: it is whole, and the one before it would undo its round."""
    second = checkpoint_of(old / "fedex")
    third = second.with_name("round-00003.safetensors")
    shutil.copy(second, third)
    rewritten(third, of_format(99))
    before = (old / "fedex" / "rounds.jsonl").read_bytes()
    for command in (["simulate", "--resume", "fedex"], ["export", "fedex", "--out", "out"]):
        with pytest.raises(FormatError, match=r"round-00003\.safetensors has format 99"):
            fedlora(*command)
    rewritten(third, of_format(2))
    with pytest.raises(FormatError, match=r"round-00003\.safetensors holds Saved\.finished"):
        fedlora("simulate", "--resume", "fedex")
    assert (old / "fedex" / "rounds.jsonl").read_bytes() == before


def test_a_clients_memory_of_a_newer_fedlora_is_not_taken_for_none(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, 0, "run")
    memory.remember(1, Factors())
    memory.lose(1, Factors(A={"m": torch.ones(2, 3)}))
    assert memory.lost(1).A
    for path in memory.own.glob("*.safetensors"):
        rewritten(path, of_format(99))
    with pytest.raises(ClientMemoryError, match="written by a newer fedlora"):
        memory.recall(1)
    with pytest.raises(FormatError, match="written by a newer fedlora"):
        memory.lost(1)
