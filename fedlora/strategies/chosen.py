"""Ranks that a client chooses itself, among all that it was sent: only they leave.

    client   holds all r ranks. By what it trained: trains all, and of that only the chosen
             count. By the gradient: chooses first, and trains no others                `masked`
             sends their rows of A, columns of B or rows of R, and which they are       `picked`
    server   every other rank counts as it was sent down: unchanged                     `completed`

So an upload that was completed is one of all ranks, and what follows knows nothing of a choice.
Of a core of blocks, R is (r, r) on the client and (h, b, b) on the way, and its rows are the ranks.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedlora.errors import StrategyError, UpdateError
from fedlora.lora.adapter import Factors, Tensors
from fedlora.strategies.base import Client, Round

Chosen = Mapping[str, Tensor]
"""By module the ranks that were chosen, in ascending order; a module of none is not there."""


@runtime_checkable
class ChoosesRanks(Protocol):
    """Needed beside Strategy where `needs().client_choice`."""

    def choose(self, begun: Factors, moved: Factors, client: Client, round: Round) -> Chosen:
        """Client: the ranks to send, as many over all modules as its layers have.

        moved: what it trained; where it chooses by the gradient, `begun` less that.
        """


def chooses(strategy: Any) -> ChoosesRanks | None:
    """Itself, if its clients choose; StrategyError, if it then has no `choose`."""
    if not strategy.needs().client_choice:
        return None
    if isinstance(strategy, ChoosesRanks):
        return strategy
    name = type(strategy).__name__
    raise StrategyError(
        f"{name}.needs() says client_choice, and {name} has no choose(begun, moved, client, "
        "round): write it, or leave that out"
    )


def masked(begun: Factors, trained: Factors, chosen: Chosen) -> Factors:
    """What a client ends with: the chosen ranks as trained, every other as it began."""

    def kept(column: str) -> Tensors:
        old, new = getattr(begun, column), getattr(trained, column)
        return {m: _placed(x, _taken(new[m], chosen.get(m), column), chosen.get(m), column)
                for m, x in old.items()}  # fmt: skip

    return replace(trained, A=kept("A"), B=kept("B"), R=kept("R"))


def picked(sent: Factors, chosen: Chosen) -> Factors:
    """Of the factors to send, the chosen ranks."""

    def of(column: str) -> Tensors:
        side = getattr(sent, column)
        return {m: _taken(x, chosen[m], column) for m, x in side.items() if m in chosen}

    return replace(sent, A=of("A"), B=of("B"), R=of("R"))


def completed(sent: Factors, chosen: Chosen, begun: Factors) -> Factors:
    """The inverse of `picked`, with what the client began with in the other ranks.

    Of the columns of `sent` alone, and of those for all modules of `begun`.
    """

    def of(column: str) -> Tensors:
        side = getattr(sent, column)
        if not side:
            return {}
        return {m: _placed(x, side.get(m), chosen.get(m), column)
                for m, x in getattr(begun, column).items()}  # fmt: skip

    return replace(sent, A=of("A"), B=of("B"), R=of("R"))


def narrowed(
    shapes: Mapping[tuple[str, str], tuple[int, ...]], chosen: Chosen
) -> dict[tuple[str, str], tuple[int, ...]]:
    """The shapes of what is sent of tensors of these shapes."""
    found = {}
    for (column, m), shape in shapes.items():
        if column not in ("A", "B", "R"):
            found[column, m] = shape
        elif m in chosen:
            n = len(chosen[m])
            found[column, m] = (shape[0], n) if column == "B" else (n, shape[-1])
    return found


def ranks(sent: Factors) -> dict[str, int]:
    """How many ranks there are to choose of, by module."""
    cores = {m: math.prod(x.shape[:-1]) for m, x in sent.R.items()}
    return {m: len(A) for m, A in sent.A.items()} | cores


def check(chosen: Mapping[str, list[int]], ranks: Mapping[str, int], budget: int) -> Chosen:
    """A client's choice, checked against the ranks there are by module and its budget over all.

    Raises:
        UpdateError: it names what is not there, or not as many ranks as the budget.
    """
    for m, mine in chosen.items():
        whole = all(isinstance(j, int) and not isinstance(j, bool) for j in mine)
        fine = whole and mine == sorted(set(mine)) and mine and mine[0] >= 0
        if m not in ranks or not fine or mine[-1] >= ranks[m]:
            raise UpdateError(
                f"it chose {mine[:4]} of {m[:80]!r}: must be ascending ranks of 0 to "
                f"{ranks.get(m, 0) - 1} of a module that it holds"
            )
    count, want = sum(map(len, chosen.values())), min(budget, sum(ranks.values()))
    if count != want:
        raise UpdateError(f"it chose {count} ranks: must be {want}, its own over all modules")
    return {m: torch.tensor(mine) for m, mine in chosen.items()}


def check_blocks(chosen: Chosen, block: int, client: Client) -> None:
    """Of a core of blocks: whole ones, as many in each module as the client has rank for.

    Raises:
        UpdateError: names a module where they are not.
    """
    for m, layer in client.layers.items():
        mine = chosen.get(m, torch.arange(0))
        whole = mine[::block, None] + torch.arange(block) if len(mine) % block == 0 else mine
        aligned = not bool((mine[::block] % block).any())
        if len(mine) != layer.rank or not aligned or not torch.equal(whole.flatten(), mine):
            raise UpdateError(
                f"it chose {mine.tolist()[:8]} of {m[:80]!r}: must be {layer.rank} ranks, those of "
                f"whole blocks of {block}"
            )


def _taken(x: Tensor, ranks: Tensor | None, column: str) -> Tensor:
    """These rows of A or R, or columns of B."""
    if ranks is None:
        ranks = torch.arange(0)
    return x[:, ranks] if column == "B" else x.flatten(0, -2)[ranks]


def _placed(x: Tensor, part: Tensor | None, ranks: Tensor | None, column: str) -> Tensor:
    """x with this part in place of these ranks."""
    if part is None or ranks is None:
        return x
    if column == "B":
        return x.index_copy(1, ranks, part.to(x))
    return x.flatten(0, -2).index_copy(0, ranks, part.to(x)).view_as(x)
