"""The algebra on pairs against its definition on dense matrices, in float64."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedlora.lora.adapter import Pair, apply, dense
from fedlora.lora.lowrank import (
    accumulate,
    complement,
    compress,
    extend,
    inner,
    leading_svd,
    mean_and_residual,
    norm,
    orthonormal,
    pad,
    principal,
    rescale,
    stack,
    svd,
    tail,
    weighted,
)

D, K = 23, 17


def pair(rank: int, seed: int = 0, scale: float | None = None, d: int = D, k: int = K) -> Pair:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, k, generator=g, dtype=torch.float64)
    B = torch.randn(d, rank, generator=g, dtype=torch.float64)
    return Pair(A, B, 7 / (rank + 1) if scale is None else scale)


def close(x: Tensor, y: Tensor, atol: float = 1e-10) -> None:
    assert_close(x, y, rtol=0, atol=atol)


def summed(pairs: Sequence[Pair], weights: Sequence[float]) -> Tensor:
    return sum((w * p.delta() for w, p in zip(weights, pairs, strict=True)), torch.zeros(()))


ranks = st.lists(st.integers(1, 6), min_size=1, max_size=5)
shares = st.lists(st.floats(0.01, 1), min_size=5, max_size=5)


@given(ranks=ranks, weights=shares)
@settings(deadline=None, max_examples=40)
def test_a_stack_is_the_weighted_sum_at_any_ranks(ranks: list[int], weights: list[float]) -> None:
    pairs = [pair(r, seed) for seed, r in enumerate(ranks)]
    stacked = stack(pairs, weights[: len(pairs)])
    assert stacked.rank == sum(ranks)
    close(stacked.delta(), summed(pairs, weights[: len(pairs)]))


@given(ranks=ranks, cut=st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_compress_errs_by_exactly_the_singular_values_it_drops(ranks: list[int], cut: int) -> None:
    whole = stack([pair(r, seed) for seed, r in enumerate(ranks)])
    dropped = torch.linalg.svdvals(whole.delta())[cut:].norm()
    close((compress(whole, cut).delta() - whole.delta()).norm(), dropped, 1e-9)
    assert compress(whole, cut).rank <= min(cut, D, K)


def test_svd_through_the_core_is_the_dense_svd() -> None:
    for rank in (3, 40):  # 40 is above both sides
        p = pair(rank)
        U, S, Vh = svd(p)
        close(S, torch.linalg.svdvals(p.delta())[: len(S)])
        close((U * S) @ Vh, p.delta(), 1e-9)
        close(U.T @ U, torch.eye(len(S), dtype=S.dtype))
        close(Vh @ Vh.T, torch.eye(len(S), dtype=S.dtype))


@pytest.mark.parametrize("decay", ["flat", "slow", "fast", "cliff"])
def test_the_sketch_of_a_wide_stack_errs_within_a_thousandth_of_the_optimum(decay: str) -> None:
    d, k, r, R = 230, 190, 9, 170
    at = torch.arange(R, dtype=torch.float64)
    S = {"flat": 1 - at / (4 * R), "slow": 1 / (1 + at), "fast": 0.9**at,
         "cliff": torch.where(at < 12, 1.0, 1e-3).double()}[decay]  # fmt: skip
    U = orthonormal(d, R, torch.Generator().manual_seed(1)).double()
    V = orthonormal(k, R, torch.Generator().manual_seed(2)).double()
    wide_stack = Pair(V.T, U * S / 0.7, 0.7)
    assert 3 * (2 * r + 16) < R, "else the exact path is what is tested"
    whole, best = wide_stack.delta(), torch.linalg.svdvals(wide_stack.delta())[r:].norm()
    assert (compress(wide_stack, r).delta() - whole).norm() <= best * (1 + 1e-3)
    left, sizes, right = leading_svd(wide_stack, r)
    close(left.T @ left, torch.eye(r, dtype=S.dtype))
    close(right @ right.T, torch.eye(r, dtype=S.dtype))
    assert_close(sizes, torch.linalg.svdvals(whole)[:r], rtol=2e-2, atol=0)
    assert torch.equal(left, leading_svd(wide_stack, r)[0]), "the same stack gives the same bits"


def test_a_compressed_pair_leaves_every_direction_able_to_learn() -> None:
    thin = pad(pair(2), 5)
    c = compress(thin, 5)
    assert (c.A.norm(dim=1) + c.B.norm(dim=0)).min() > 0.5


@given(m=st.integers(1, 5), rank=st.integers(1, 4), weights=shares)
@settings(deadline=None, max_examples=40)
def test_the_residual_is_what_averaging_the_factors_misses(
    m: int, rank: int, weights: list[float]
) -> None:
    pairs = [pair(rank, seed, scale=1.0 + seed) for seed in range(m)]
    p = [w / sum(weights[:m]) for w in weights[:m]]
    A = sum(w * x.A for w, x in zip(p, pairs, strict=True))
    B = sum(w * x.scale * x.B for w, x in zip(p, pairs, strict=True))
    mean, missed = mean_and_residual(pairs, p)
    close(mean.A, A)
    close(mean.scale * mean.B, B)
    assert missed.rank == (m - 1) * rank
    if m > 1:
        close(dense(missed), summed(pairs, p) - B @ A)


def test_a_weighted_sum_is_the_pairs_own_tensors_until_it_is_used() -> None:
    pairs = [pair(r, r) for r in (2, 3)]
    total = weighted(pairs, [0.25, 0.75])
    assert all(x is p.A for x, p in zip(total.A, pairs, strict=True))
    assert all(x is p.B for x, p in zip(total.B, pairs, strict=True))
    close(dense(total), summed(pairs, [0.25, 0.75]))
    x = torch.randn(K, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    close(apply(total, x), dense(total) @ x)


def test_a_residual_is_the_pairs_own_tensors_until_it_is_used() -> None:
    pairs = [pair(3, seed, 1.5) for seed in range(4)]
    _, missed = mean_and_residual(pairs, [0.1, 0.4, 0.2, 0.3])
    assert all(x is p.A for x, p in zip(missed.A, pairs[:-1], strict=True))
    assert all(x is p.B for x, p in zip(missed.B, pairs[:-1], strict=True))
    x = torch.randn(K, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    close(apply(missed, x), dense(missed) @ x)


def test_a_residual_of_narrow_numbers_is_their_differences_in_float32() -> None:
    pairs = [pair(3, seed, 1.0) for seed in range(3)]
    narrow = [Pair(p.A.bfloat16(), p.B.bfloat16()) for p in pairs]
    wide = [Pair(p.A.double(), p.B.double()) for p in narrow]
    p = [0.2, 0.3, 0.5]
    missed, true = (mean_and_residual(x, p)[1] for x in (narrow, wide))
    close(dense(missed).double(), dense(true), 1e-5)


def test_a_stack_of_narrow_numbers_is_multiplied_in_float32() -> None:
    narrow = [Pair(p.A.bfloat16(), p.B.bfloat16(), 1 / 3) for p in (pair(2, 1), pair(3, 2))]
    made = stack(narrow)
    assert made.A.dtype == made.B.dtype == torch.float32
    assert torch.equal(made.A, torch.cat([p.A.float() for p in narrow]) * (1 / 3))


def test_the_residual_is_the_covariance_of_the_factors_and_has_its_rank() -> None:
    m, r, p = 4, 3, [0.1, 0.4, 0.2, 0.3]
    pairs = [pair(r, seed, 1.0) for seed in range(m)]
    A, B = (sum(w * getattr(x, f) for w, x in zip(p, pairs, strict=True)) for f in "AB")
    covariance = sum(w * (x.B - B) @ (x.A - A) for w, x in zip(p, pairs, strict=True))
    close(dense(mean_and_residual(pairs, p)[1]), covariance)
    assert torch.linalg.matrix_rank(covariance) == (m - 1) * r < m * r


def test_the_residual_vanishes_where_a_factor_is_shared() -> None:
    shared = pair(3)
    same_A = [Pair(shared.A, pair(3, s).B, 1.5) for s in range(3)]
    same_B = [Pair(pair(3, s).A, shared.B, 1.5) for s in range(3)]
    for pairs in (same_A, same_B):
        missed = mean_and_residual(pairs, [0.2, 0.3, 0.5])[1]
        close(dense(missed), torch.zeros(D, K, dtype=torch.float64))


def test_what_all_pairs_share_is_in_their_mean_bit_for_bit_and_no_pair_is_written_to() -> None:
    shared, kept = pair(3, scale=0.7), pair(3, scale=0.7)
    mean, _ = mean_and_residual([shared, replace(shared), replace(shared)], [0.2, 0.3, 0.5])
    assert torch.equal(mean.A, kept.A)
    assert torch.equal(mean.B, kept.B)
    mean_and_residual([shared, pair(3, 1, 0.7)], [0.5, 0.5])
    assert torch.equal(shared.A, kept.A)
    assert torch.equal(shared.B, kept.B)


def test_pad_and_rescale_leave_the_delta_as_it_is() -> None:
    p = pair(3)
    close(pad(p, 7).delta(), p.delta())
    close(rescale(p, 0.3).delta(), p.delta())
    assert (pad(p, 7).rank, rescale(p, 0.3).scale) == (7, 0.3)


def test_head_and_tail_add_up_and_extend_puts_a_new_head_before_the_old_tail() -> None:
    whole, head = pair(5), pair(2, seed=1, scale=3.0)
    lead = Pair(whole.A[:2], whole.B[:, :2], whole.scale)
    close(lead.delta() + tail(whole, 2).delta(), whole.delta())
    longer = extend(head, whole)
    close(longer.delta(), head.delta() + tail(whole, 2).delta())
    assert (longer.rank, longer.scale) == (5, whole.scale)


@given(r1=st.integers(1, 6), r2=st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_inner_products_need_no_dense_matrix(r1: int, r2: int) -> None:
    x, y = pair(r1, 1), pair(r2, 2)
    close(inner(x, y), (x.delta() * y.delta()).sum(), 1e-9)
    close(norm(x), x.delta().norm())


def test_norms_do_not_see_the_gauge() -> None:
    p, g = pair(3), torch.Generator().manual_seed(5)
    M = torch.randn(3, 3, generator=g, dtype=torch.float64)
    close(norm(Pair(torch.linalg.inv(M) @ p.A, p.B @ M, p.scale)), norm(p), 1e-8)


def test_complement_keeps_the_basis_and_adds_directions_orthogonal_to_it() -> None:
    g = torch.Generator().manual_seed(0)
    basis = orthonormal(19, 3, g)
    full = complement(basis, orthonormal(19, 8, g), 8)
    assert torch.equal(full[:, :3], basis)
    close(full.T @ full, torch.eye(8), 1e-5)
    assert torch.equal(complement(full, basis, 2), full[:, :2])


@pytest.mark.parametrize(("d", "k"), [(40, 70), (70, 40)])
def test_the_principal_part_by_iteration_is_that_of_the_full_svd(d: int, k: int) -> None:
    g = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(d, k, generator=g).double(), full_matrices=False)
    S = 0.7 ** torch.arange(40.0).double()
    W, r = (U * S) @ Vh, 5
    for exact_up_to in (1024, 0):
        u, s, vh = principal(W, r, torch.Generator().manual_seed(1), exact_up_to)
        close(s, S[:r], 1e-9)
        close((u * s) @ vh, (U[:, :r] * S[:r]) @ Vh[:r], 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_summed_in_float32(dtype: torch.dtype) -> None:
    pairs = [Pair(x.A.to(dtype), x.B.to(dtype), x.scale) for x in (pair(3, 1), pair(3, 2))]
    exact = summed([Pair(x.A.double(), x.B.double(), x.scale) for x in pairs], [0.5, 0.5])
    stacked = stack(pairs, [0.5, 0.5])
    assert stacked.A.dtype == stacked.B.dtype == torch.float32
    close(stacked.delta().double(), exact, 1e-5)
    close(compress(stacked, 6).delta().double(), exact, 1e-4)
    close(norm(pairs[0]).double(), pairs[0].delta().double().norm(), 0.2)


def test_accumulate_adds_pairs_and_dense_changes_in_the_order_they_come() -> None:
    a, b = pair(2, 1), pair(4, 2).delta()
    total = accumulate(accumulate(None, a), b)
    assert torch.equal(total, a.delta() + b)
