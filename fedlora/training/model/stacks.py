"""Stacks of experts as a whole: their names, their one rank, and how PEFT's files pack them.

What one expert of a stack is, and how PEFT lays the pairs out: expert.py.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlora.errors import ModelError
from fedlora.lora.adapter import Adapter, Pair
from fedlora.lora.lowrank import pad
from fedlora.training.model.shape import Shape


def stacks_of(shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """The layers of each stack, in the order of its experts."""
    found: dict[str, list[str]] = {}
    for m, shape in shapes.items():
        if shape.stack:
            found.setdefault(shape.stack, []).append(m)
    return found


def owners(shapes: Mapping[str, Shape]) -> list[str]:
    """What PEFT adapts: the modules, and each stack once."""
    return [*dict.fromkeys(shape.stack or m for m, shape in shapes.items())]


def ranks_of_stacks(ranks: Mapping[str, int], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The rank of each stack.

    Raises:
        ModelError: experts of one stack differ in it.
    """
    found: dict[str, int] = {}
    for stack, names in stacks_of({m: shapes[m] for m in ranks}).items():
        each = {ranks[m] for m in names}
        if len(each) > 1:
            raise ModelError(
                f"lora.rank-pattern gives experts of {stack} the ranks "
                f"{', '.join(map(str, sorted(each)))}; they are one parameter, which has one rank"
            )
        found[stack] = each.pop()
    return found


def alike(
    adapter: Adapter, shapes: Mapping[str, Shape], across_stacks: bool = False
) -> dict[str, Pair]:
    """The same changes, with all experts of every stack, at one rank and one scale.

    Rows and columns of 0 fill lower ranks up, and an expert that has no pair gets one of zeros.
    across_stacks: one rank for the experts of all stacks.
    """
    found, groups = dict(adapter), stacks_of(shapes)
    tops = {s: max((adapter[m].rank for m in names if m in adapter), default=1)
            for s, names in groups.items()}  # fmt: skip
    for stack, names in groups.items():
        rank = max(tops.values()) if across_stacks else tops[stack]
        scale = next((adapter[m].scale for m in names if m in adapter), 1.0)
        for m in names:
            d, k = shapes[m].d, shapes[m].k
            p = adapter.get(m) or Pair(torch.zeros(1, k), torch.zeros(d, 1), scale)
            p = p if p.rank == rank else pad(p, rank)
            found[m] = p if p.scale == scale else Pair(p.A, p.scale / scale * p.B, scale)
    return found


def packed(pairs: Iterable[Pair]) -> tuple[Tensor, Tensor]:
    """PEFT's lora_A (E r, k) and lora_B (d, r E) of the experts' pairs, s folded into B."""
    pairs = [*pairs]
    B = torch.stack([p.scale * p.B for p in pairs], -1)  # (d, r, E)
    return torch.cat([p.A for p in pairs]), B.flatten(1).contiguous()
