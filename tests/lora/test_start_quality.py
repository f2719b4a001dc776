"""How good a start is: against the singular values themselves, and what is said of a bad one."""

import math

import pytest
import torch

from fedlora.lora.start_quality import (
    Quality,
    lines,
    nothing_learned,
    of_matrix,
    quality,
    record,
)


def test_energy_and_condition_are_those_of_the_singular_values() -> None:
    S = torch.tensor([4.0, 2.0, 1.0, 0.5])
    q = quality(S, 2)
    assert (q.found, q.condition) == (2, 2.0)
    assert q.energy == pytest.approx((16 + 4) / (16 + 4 + 1 + 0.25))
    assert quality(S[:2], 2, total=40.0).energy == pytest.approx(0.5)


def test_a_direction_that_the_matrix_lacks_is_counted_and_said() -> None:
    """The counterexample of a frame that looks like any other: its last direction is arbitrary."""
    g = torch.Generator().manual_seed(0)
    M = torch.randn(9, 2, generator=g) @ torch.randn(2, 7, generator=g)
    q = of_matrix(M, 3)
    assert (q.found, q.rank, q.condition) == (2, 3, math.inf)
    said = lines("here", {"m": q, "n": of_matrix(torch.eye(7), 3)})
    assert "m has 2 of 3 directions" in said[1]
    assert len(lines("here", {"n": of_matrix(torch.eye(7), 3)})) == 1


@pytest.mark.parametrize("shape", [(384, 384), (300, 700), (1024, 1024)], ids=str)
def test_rounding_is_no_direction(shape: tuple[int, int]) -> None:
    """All gradients equal: an SVD in float32 has 16 directions for a matrix of ones."""
    ones = torch.ones(shape)
    assert float(torch.linalg.svdvals(ones[:384, :384])[1]) > 0
    q = of_matrix(ones, 16)
    assert (q.found, q.condition) == (1, math.inf)
    assert q.energy == pytest.approx(1.0)
    assert of_matrix(torch.diag(torch.tensor([1.0, 1e-3, 1e-4])), 3).found == 3


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_of_zeros_or_of_no_numbers_nothing_can_be_learned(bad: float) -> None:
    zero = quality(torch.full((4,), bad), 2)
    assert zero.found == 0
    assert nothing_learned({"m": zero, "n": zero})
    assert not nothing_learned({"m": zero, "n": Quality(2, 1, 0.5, math.inf)})
    assert not nothing_learned({})
    assert of_matrix(torch.full((5, 3), bad), 2).found == 0
    assert record("here", {"m": zero})["lines"]


def test_an_ill_conditioned_start_is_said_with_what_to_do() -> None:
    (line,) = lines("here", {"m": quality(torch.tensor([1.0, 5e-5]), 2)})
    assert "ill-conditioned: lower clients.ranks" in line
    (line,) = lines("here", {"m": quality(torch.tensor([1.0, 0.5]), 2)})
    assert "ill" not in line
