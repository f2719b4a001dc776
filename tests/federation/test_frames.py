"""A message in frames: whole on the other side, and its bytes nowhere twice."""

import gc
import weakref
from array import array
from collections.abc import Iterator

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora.federation.client.dispatch import as_bytes, message_of_bytes
from fedlora.federation.client.frames import PIECE, assembled, frames
from fedlora.federation.wire.messages import pack, unpack

LARGE = PIECE + 3


@pytest.fixture(autouse=True)
def a_task() -> None:
    """What Flower's Message() asks of its process."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


SIZES = {"none": 0, "one": 1, "piece": PIECE, "large": 3 * PIECE + 1}


def a_message(**records: ArrayRecord) -> Message:
    content = RecordDict({**records, "job": ConfigRecord({"round": 3})})
    message = Message(content, dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = "1"
    return message


def of(data: bytes, n: int) -> Array:
    return Array("uint8", (n,), "fedlora.uint8", data)


def whole(stream: Iterator[bytes]) -> Message:
    return assembled(stream, message_of_bytes, lambda m: m)


def test_a_message_is_on_the_other_side_what_it_was() -> None:
    first = ArrayRecord({name: of(bytes([7]) * n, n) for name, n in SIZES.items()})
    second = ArrayRecord({"one": of(b"x", 1)})
    want = a_message(b=first, a=second, empty=ArrayRecord())
    kept = {(r, n): bytes(a.data) for r in want.content.array_records
            for n, a in want.content.array_records[r].items()}  # fmt: skip
    got = whole(frames(want, as_bytes))
    assert got.content["job"] == ConfigRecord({"round": 3})
    assert [*got.content] == [*want.content]
    found = {(r, n): bytes(a.data) for r in got.content.array_records
             for n, a in got.content.array_records[r].items()}  # fmt: skip
    assert found == kept
    assert got.content.array_records["b"]["large"].shape == (SIZES["large"],)


def test_an_array_is_let_go_of_once_it_is_sent_and_the_next_ones_are_not() -> None:
    data = [array("B", bytes(LARGE)) for _ in range(3)]
    gone = [weakref.ref(x) for x in data]
    message = a_message(sent=ArrayRecord({name: of(b"", 0) for name in "abc"}))
    for a in message.content.array_records["sent"].values():
        a.data = data.pop(0)  # type: ignore[assignment]
    del a
    stream = frames(message, as_bytes)
    for _ in range(4):  # the head, the first array in two pieces, a piece of the second
        next(stream)
    gc.collect()
    assert [ref() is None for ref in gone] == [True, False, False]


def test_another_message_of_the_same_record_keeps_its_arrays() -> None:
    shared = ArrayRecord({"x": of(b"abc", 3)})
    one, other = a_message(sent=shared), a_message(sent=shared)
    whole(frames(one, as_bytes))
    assert other.content.array_records["sent"]["x"].data == b"abc"
    assert one.content.array_records["sent"]["x"].data == b""


@pytest.mark.parametrize("frame", [0, 1, 2])
def test_a_stream_that_is_cut_is_no_message(frame: int) -> None:
    sent = [*frames(a_message(sent=ArrayRecord({"x": of(bytes(LARGE), LARGE)})), as_bytes)]
    with pytest.raises(EOFError):
        whole(iter(sent[:frame]))
    short = [*sent[:-1], sent[-1][:-1]]
    with pytest.raises(EOFError, match=f"sent/x: {LARGE - 1} bytes came, must be {LARGE}"):
        whole(iter(short))


def test_a_stream_with_more_than_its_message_is_none() -> None:
    sent = [*frames(a_message(sent=ArrayRecord({"x": of(bytes(3), 3)})), as_bytes)]
    with pytest.raises(ValueError, match="more frames"):
        whole(iter([*sent, b"y"]))
    with pytest.raises(ValueError, match="more than its 3 bytes"):
        whole(iter([*sent[:-1], sent[-1] + b"y"]))


def test_a_tensor_is_made_in_place_of_what_is_nobody_elses_and_else_of_a_copy() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    packed = pack(x, "float32")
    copied = unpack(packed, "x")
    copied += 1
    assert torch.equal(unpack(packed, "x"), x)
    packed.data = bytearray(packed.data)  # type: ignore[assignment]
    placed = unpack(packed, "x")
    placed += 1
    assert torch.equal(unpack(packed, "x"), x + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int8", "int4"])
def test_a_tensor_of_a_message_that_came_in_frames_is_the_one_that_was_sent(dtype: str) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    want = unpack(pack(x, dtype), "x")
    got = whole(frames(a_message(sent=ArrayRecord({"x": pack(x, dtype)})), as_bytes))
    assert torch.equal(unpack(got.content.array_records["sent"]["x"], "x"), want)
