"""How the certificate's numbers travel: as one array in the clear, or inside a secure sum.

pack_numbers, unpack_numbers      beside a client's update, one array of (times, names, K)
with_changes, without_changes     among the tensors of a masked vector, as changes of the round
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedlora.errors import UpdateError
from fedlora.federation.wire.messages import Shapes, pack, unpack
from fedlora.lora.adapter import Factors
from fedlora.strategies.base import Upload
from fedlora.training.certificate import K, Numbers, Witness


def pack_numbers(*times: Numbers) -> ArrayRecord:
    """One array of (times, names, K): the start's numbers, say, and the end's."""
    stacked = [torch.stack([*numbers.values()]) for numbers in times]
    return ArrayRecord({"numbers": pack(torch.stack(stacked), "float64")})


def unpack_numbers(record: ArrayRecord, names: Sequence[str], times: int = 2) -> list[Numbers]:
    """The inverse.

    Raises:
        WireError, UpdateError: they are not those of these names.
    """
    if "numbers" not in record:
        raise UpdateError("the certificate lacks its numbers")
    x = unpack(record["numbers"], "certificate", (times, len(names), K))
    return [dict(zip(names, part, strict=True)) for part in x]


# -- within a secure sum --------------------------------------------------------------------------

WITHIN = "certificate/"
"""How a difference is named among the other tensors of a masked vector."""


def is_change(key: tuple[str, str]) -> bool:
    """Is (column, name) a difference of the certificate's, and no tensor that is trained?"""
    return key[0] == "other" and key[1].startswith(WITHIN)


def masked_shapes(names: Iterable[str]) -> dict[tuple[str, str], tuple[int, ...]]:
    """What a client adds to its vector, as `wire.Shapes`."""
    return {("other", WITHIN + name): (K,) for name in names}


def without_masked(shapes: Shapes) -> dict[tuple[str, str], tuple[int, ...]]:
    """The inverse: the shapes that strategies know of."""
    return {(c, n): shape for (c, n), shape in shapes.items() if not n.startswith(WITHIN)}


def with_changes(
    sent: Factors, start: Numbers, end: Numbers, scales: Mapping[str, float]
) -> Factors:
    """What is to be summed, with the changes of the numbers, each over its public scale."""
    changes = {WITHIN + m: ((end[m] - start[m]) / scales[m]).nan_to_num() for m in start}
    return replace(sent, other={**sent.other, **changes})


def without_changes(
    uploads: Sequence[Upload], scales: Mapping[str, float]
) -> tuple[list[Upload], Witness]:
    """The uploads as strategies know them; and the mean of the changes, as if one client's."""
    found: dict[str, Tensor] = {}
    bare = []
    for u in uploads:
        mine = {n: x for n, x in u.sent.other.items() if n.startswith(WITHIN)}
        found |= {n.removeprefix(WITHIN): x.double() for n, x in mine.items()}
        other = {n: x for n, x in u.sent.other.items() if n not in mine}
        bare.append(replace(u, sent=replace(u.sent, other=other)))
    change = {m: x * scales[m] for m, x in found.items()}
    return bare, Witness(1.0, {m: torch.zeros(K).double() for m in change}, change)
