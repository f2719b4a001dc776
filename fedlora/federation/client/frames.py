"""A message between a node's process and its worker, of which neither side holds an array twice.

    the first frame    how many bytes each array has, and the rest of the message
    the others         those bytes, one array after the other, in pieces of at most PIECE

What is sent is let go of as it goes; what comes is written once, to where it stays.
"""

import json
from collections.abc import Callable, Iterator
from typing import TypeVar

from flwr.app import Array, ArrayRecord, Message

PIECE = 1 << 20
"""Bytes of an array in one frame."""

Size = tuple[str, str, int]
"""A record's name, an array's in it, and its bytes."""

Whole = TypeVar("Whole")


def frames(message: Message, packed: Callable[[Message], bytes]) -> Iterator[bytes]:
    """The frames of a message, whose arrays have no bytes any more once the first was taken.

    packed: a message without them, as bytes.
    """
    arrays = _taken(message)
    sizes = json.dumps([(record, name, len(a.data)) for record, name, a in arrays]).encode()
    yield b"".join([len(sizes).to_bytes(8, "little"), sizes, packed(message)])
    arrays.reverse()
    while arrays:
        data = memoryview(arrays.pop()[2].data)
        for at in range(0, len(data), PIECE):
            yield bytes(data[at : at + PIECE])


def assembled(
    stream: Iterator[bytes],
    unpacked: Callable[[bytes], Whole],
    message_of: Callable[[Whole], Message],
) -> Whole:
    """What `unpacked` makes of the first frame, its message's arrays filled from the others.

    Their data are bytearrays of nobody else, so that a tensor may be made of them in place.

    Raises:
        EOFError: there are fewer frames than the first says.
        ValueError: there are more.
    """
    head = next(stream, b"")
    start = 8 + int.from_bytes(head[:8], "little")
    sizes: list[Size] = [(r, n, size) for r, n, size in json.loads(head[8:start] or "[]")]
    if not head:
        raise EOFError("a message of no frames")
    whole = unpacked(head[start:])
    message = message_of(whole)
    for record, name, size in sizes:
        data, at = bytearray(size), 0
        while at < size:
            piece = next(stream, b"")
            if not piece:
                raise EOFError(f"{record}/{name}: {at} bytes came, must be {size}")
            if at + len(piece) > size:
                raise ValueError(f"{record}/{name}: more than its {size} bytes came")
            data[at : at + len(piece)] = piece
            at += len(piece)
        if isinstance(arrays := message.content[record], ArrayRecord):
            arrays[name].data = data  # type: ignore[assignment]
    if next(stream, None) is not None:
        raise ValueError("more frames came than the message has")
    return whole


def _taken(message: Message) -> list[tuple[str, str, Array]]:
    """The message's arrays, whose places in it are taken by arrays without bytes."""
    found: list[tuple[str, str, Array]] = []
    for record, arrays in [*message.content.items()] if message.has_content() else ():
        if isinstance(arrays, ArrayRecord):
            found += [(record, name, a) for name, a in arrays.items()]
            bare = {n: Array(a.dtype, a.shape, a.stype, b"") for n, a in arrays.items()}
            message.content[record] = ArrayRecord(bare)
    return found
