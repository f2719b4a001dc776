"""Checkpoints: there whole or not at all, refused by name where they are not what they must be."""

import io
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import CheckpointError
from fedlora.federation.server.journal import Member, Saved, state_types
from fedlora.lora.adapter import Factors, Pair
from fedlora.lora.tree_file import load, notes, save, write_atomically
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Version
from fedlora.strategies.base_log import BaseLog
from tests.support.strategy_federation import fitting, play
from tests.support.tiny_federation import ROOT


def a_tree() -> Any:
    x = torch.arange(6.0).reshape(2, 3)
    return {
        "factors": Factors({"m": 0.5}, {"m": x}, {"m": x.T}, other={"h": x[0]}),
        7: (Version(2, {"m": Pair(x, x.T, 1 / 3)}, snapshot=True), None, True, 3, 0.1, "text"),
        "log": BaseLog((Version(1, {"m": x}),)),
        "set": frozenset({"a", "b"}),
        "empty": torch.zeros(0, 4),
    }


def test_a_tree_comes_back_with_its_types_and_bits(tmp_path: Path) -> None:
    save(tmp_path / "x", a_tree(), {"round": "3"})
    tree = load(tmp_path / "x", Version, BaseLog)
    assert list(tree) == ["factors", 7, "log", "set", "empty"]
    assert isinstance(tree["factors"], Factors)
    assert torch.equal(tree["factors"].A["m"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(tree["factors"].B["m"], tree["factors"].A["m"].T)
    version, *rest = tree[7]
    assert rest == [None, True, 3, 0.1, "text"]
    assert (version.number, version.snapshot, version.delta["m"].scale) == (2, True, 1 / 3)
    assert tree["set"] == frozenset({"a", "b"})
    assert tree["empty"].shape == (0, 4)
    assert notes(tmp_path / "x") == {"round": "3"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_tensor_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.tensor([1, 2, 3], dtype=dtype)
    save(tmp_path / "x", x)
    assert torch.equal(load(tmp_path / "x"), x)
    assert load(tmp_path / "x").dtype == dtype


def test_tensors_that_share_storage_come_back_each_with_its_own(tmp_path: Path) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    save(tmp_path / "x", (x, x, x[1:], x.T))
    one, two, part, turned = load(tmp_path / "x")
    assert torch.equal(one, x)
    assert torch.equal(part, x[1:])
    assert torch.equal(turned, x.T)
    two.zero_()
    assert torch.equal(one, x)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_saved_state_of_every_strategy_comes_back(name: str, tmp_path: Path) -> None:
    strategy: Any = STRATEGIES[name]()
    *_, last = play(strategy, fitting(strategy), [(0, 1, 2), (3, 0)])
    members = {3: Member(3, 4, first={"loss": 0.5}), 0: Member(0, 2)}
    saved = Saved("token", last.after, members, {"b": {"accuracy": 0.5}}, 1.5)
    save(tmp_path / "x", saved)
    found = load(tmp_path / "x", Saved, Member, *state_types(strategy))
    assert found.members == members
    assert type(found.state) is type(last.after)
    save(tmp_path / "again", found)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "again").read_bytes()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such file"):
        load(tmp_path / "nowhere")


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "round-00003"
    save(path, a_tree())
    whole = path.read_bytes()
    cuts = [b"", whole[:4], whole[: len(whole) // 2], whole[:-1], b"\xff" * len(whole)]
    for data in [*cuts, whole[:9] + b"}" + whole[10:], b"{}", os.urandom(200)]:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="round-00003 is damaged"):
            load(path)


def test_every_flipped_bit_of_a_file_is_seen(tmp_path: Path) -> None:
    """Head, tree, notes, tensors and the digest itself: each byte once, another bit each."""
    path = tmp_path / "round-00003"
    save(path, a_tree(), {"round": "3"})
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        for reading in (load, notes):
            with pytest.raises(CheckpointError, match="round-00003 is damaged"):
                reading(path)
    path.write_bytes(whole)
    assert notes(path) == {"round": "3"}


def test_two_bytes_that_change_places_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save(path, torch.tensor([1.0, 2.0]))
    path.write_bytes(path.read_bytes()[:-8] + torch.tensor([2.0, 1.0]).numpy().tobytes())
    with pytest.raises(CheckpointError, match="its digest is not that of its bytes"):
        load(path)


def test_a_file_whose_digest_is_taken_out_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save(path, torch.tensor([1.0, 2.0]))
    without = path.read_bytes().replace(rb"\"digest\"", rb"\"dlgest\"")
    path.write_bytes(without)
    with pytest.raises(CheckpointError, match="it has no digest"):
        load(path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, buffer)
    for data in (pickle.dumps(Bomb()), buffer.getvalue()):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged"):
            load(tmp_path / "x")
    assert not (tmp_path / "exploded").exists()


def test_a_safetensors_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for metadata in (None, {"tree": "3"}, {"tree": '{"tensor": "t0"}'}, {"tree": "[}"}):
        save_file({"x": torch.zeros(2)}, tmp_path / "x", metadata=metadata)
        with pytest.raises(CheckpointError, match="x is damaged"):
            load(tmp_path / "x")


@dataclass
class Foreign:
    x: int = 1


def test_a_type_that_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "x", {"state": Foreign()})
    with pytest.raises(CheckpointError, match="holds a Foreign, which this run has no use for"):
        load(tmp_path / "x")
    assert load(tmp_path / "x", Foreign) == {"state": Foreign()}


def test_a_value_that_cannot_be_kept_is_refused_when_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Path cannot be kept"):
        save(tmp_path / "x", {"p": tmp_path})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "x", b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


WRITER = """
import sys, torch
from pathlib import Path
from fedlora.lora.tree_file import save
n = 0
while True:
    n += 1
    x, y = torch.full((300, 300), float(n)), torch.full((7,), n)
    save(Path(sys.argv[1]), {"n": n, "x": x, "y": y})
    if n == 1:
        print("begun", flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "state"
    chance = random.Random(0)
    for _ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        assert writer.stdout
        writer.stdout.readline()
        for _ in range(20):  # read while it writes
            found = load(path)
            assert (found["x"] == found["n"]).all()
        time.sleep(chance.random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        found = load(path)
        assert (found["x"] == found["n"]).all()
        assert (found["y"] == found["n"]).all()
