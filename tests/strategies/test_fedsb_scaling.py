"""LoRA-SB's scaling in fixed frames: where they are orthonormal, the best core needs no scale."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedlora.lora.adapter import Factors, Pair
from fedlora.strategies.fedsb import FedSB
from tests.support.strategy_federation import EQUAL, MODULES, make_start, noise

STARTS = {"orthogonal": 1e-5, "svd-w0": 1e-11, "update-approx": 1e-11}
"""How far the frames may be from orthonormal: the first are drawn in float32."""
SCALES = (0.25, 1.0, 1.7, 16.0)


def begun(init_from: Any) -> Factors:
    """The state that fedsb begins with, its frames in float64."""
    strategy = FedSB(init_from=init_from, eta=0.03)
    state = strategy.init(make_start(EQUAL))
    if init_from == "update-approx":
        full = {m: noise((d, min(d, k)), 0, 0, f"first/{m}") for m, (d, k) in MODULES.items()}
        down = {m: noise((min(d, k), k), 0, 0, f"step/{m}") for m, (d, k) in MODULES.items()}
        state = strategy.from_gradient(state, {m: Pair(down[m], full[m]) for m in MODULES})
    return state


def gradients(W0: Tensor, B: Tensor, A: Tensor, R: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """dL/dW (d, k) and dL/dR (r, r) of a squared loss at W = W0 + s B R A, by autograd."""
    x, y = noise((W0.shape[1], 23), 0, 0, "x"), noise((W0.shape[0], 23), 0, 0, "y")
    W = (W0 + s * B @ R @ A).requires_grad_()
    core = R.clone().requires_grad_()
    (W @ x - y).square().mean().backward()
    ((W0 + s * B @ core @ A) @ x - y).square().mean().backward()
    assert W.grad is not None
    assert core.grad is not None
    return W.grad, core.grad


def best_core(B: Tensor, A: Tensor, target: Tensor) -> Tensor:
    """X of the least |B X A - target|, by numpy: vec(B X A) = (B kron A^T) vec X."""
    design = np.kron(B.numpy(), A.T.numpy())
    found = np.linalg.lstsq(design, target.numpy().reshape(-1), rcond=None)[0]
    return torch.from_numpy(found.reshape(B.shape[1], A.shape[0]))


def apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("init_from", STARTS)
def test_the_best_step_in_fedsbs_frames_is_the_gradients_projection_at_any_scale(
    init_from: str,
) -> None:
    state, near = begun(init_from), STARTS[init_from]
    weights = make_start(EQUAL).weights
    for m, (d, k) in MODULES.items():
        A, B = state.A[m], state.B[m]
        change = noise((len(A), len(A)), 0, 0, f"R/{m}")
        directions = []
        for s in SCALES:  # at one model: R is less where s is more
            G, g = gradients(weights[m], B, A, change / s, s)
            projected = B @ B.T @ G @ A.T @ A
            assert apart(B @ (g / s) @ A, projected) < near
            assert apart(g / s, best_core(B, A, G)) < near
            assert apart(projected, G) > 0.05, (d, k)  # there is something to miss
            directions.append(g / g.norm())
        for direction in directions:  # and so what Adam makes of it
            assert_close(direction, directions[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("init_from", STARTS)
def test_the_best_core_of_a_change_is_its_part_between_the_frames(init_from: str) -> None:
    state = begun(init_from)
    for m, (d, k) in MODULES.items():
        A, B = state.A[m], state.B[m]
        wanted = noise((d, k), 0, 0, f"D/{m}")
        for s in SCALES:
            core = B.T @ wanted @ A.T / s
            assert apart(core, best_core(s * B, A, wanted)) < STARTS[init_from]


def test_frames_that_are_not_orthonormal_bend_the_step() -> None:
    """The counterexample: LoRA-XS's B = U S."""
    state = begun("svd-w0")
    for m, W0 in make_start(EQUAL).weights.items():
        A, s = state.A[m], 1.7
        B = state.B[m] * torch.linalg.svdvals(W0)[: len(A)]
        G, g = gradients(W0, B, A, torch.zeros(len(A), len(A), dtype=torch.float64), s)
        projected = B @ best_core(B, A, G) @ A
        assert apart(B @ (g / s) @ A, projected) > 0.5
        unit = [x / x.norm() for x in (B @ g @ A, projected)]
        assert apart(unit[0], unit[1]) > 0.01  # and no one number mends it
