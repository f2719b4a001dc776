"""train.rule: each against its closed form in float64, written anew here, and in a run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlora import preflight
from fedlora.errors import ConfigError
from fedlora.training.lora_pro import adjust
from fedlora.training.riemann import moved_on_manifold
from fedlora.training.rules import ETA, AllPairs, Masked, masks, preconditioned
from tests.support.long import few
from tests.support.tiny_federation import federate, quick

Settings = Callable[..., dict[str, object]]
D, K, R = 9, 7, 3
RATE = 0.1


def drawn(seed: int = 0, zero: bool = False) -> tuple[nn.Parameter, nn.Parameter, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    A = nn.Parameter(torch.randn(R, K, generator=g, dtype=torch.float64))
    B = nn.Parameter(torch.randn(D, R, generator=g, dtype=torch.float64) * (not zero))
    return A, B, torch.randn(D, K, generator=g, dtype=torch.float64)


def back(A: nn.Parameter, B: nn.Parameter, G: torch.Tensor) -> None:
    """The gradient of <G, B A>."""
    (G * (B @ A)).sum().backward()


def numpy(*tensors: torch.Tensor) -> list[Any]:
    return [t.detach().numpy().copy() for t in tensors]


@pytest.mark.parametrize("zero", [False, True])
def test_riemanns_step_is_that_of_dense_projections_and_a_dense_svd(zero: bool) -> None:
    A, B, G = drawn(zero=zero)
    a, b, g = numpy(A, B, G)
    back(A, B, G)
    moved_on_manifold(A, B, RATE)
    PU, PV = b @ np.linalg.pinv(b), np.linalg.pinv(a) @ a
    xi = g @ PV + PU @ g - PU @ g @ PV
    U, S, Vh = np.linalg.svd(b @ a - RATE * (D * R) ** 0.5 * xi / np.linalg.norm(xi))
    want = (U[:, :R] * S[:R]) @ Vh[:R]
    got = (B @ A).detach().numpy()
    assert np.abs(got - want).max() < 1e-12
    assert np.allclose((A @ A.T).detach().numpy(), np.eye(R))


def test_riemanns_step_does_not_depend_on_the_factors_and_adams_does() -> None:
    """B M, M^-1 A is the same product: the point of the paper; SGD on factors is the other case."""
    M = torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 3, 0.5]], dtype=torch.float64)
    found, plain = [], []
    for N in (torch.eye(R, dtype=torch.float64), M):
        A, B, G = drawn()
        with torch.no_grad():
            A.copy_(torch.linalg.inv(N) @ A)
            B.copy_(B @ N)
        back(A, B, G)
        assert A.grad is not None
        assert B.grad is not None
        plain.append(((B - RATE * B.grad) @ (A - RATE * A.grad)).detach())
        moved_on_manifold(A, B, RATE)
        found.append((B @ A).detach())
    assert torch.allclose(found[0], found[1], atol=1e-10)
    assert not torch.allclose(plain[0], plain[1], atol=1e-2)


@pytest.mark.parametrize("zero", [False, True])
def test_lora_pros_gradients_are_the_least_squares_fit_of_w_s_nearest_to_what_they_were(
    zero: bool,
) -> None:
    """Written as one dense problem: of all (h_A, h_B) that fit G best, those nearest to g."""
    A, B, G = drawn(zero=zero)
    a, b, g = numpy(A, B, G)
    back(A, B, G)
    adjust(A, B)
    hA, hB = numpy(A.grad, B.grad)
    fit = np.hstack([np.kron(b, np.eye(K)), np.kron(np.eye(D), a.T)])  # of (h_A, h_B), flattened
    were = np.concatenate([(b.T @ g).ravel(), (g @ a.T).ravel()])
    want = were + np.linalg.pinv(fit) @ (g.ravel() - fit @ were)
    assert np.abs(b @ hA + hB @ a - (fit @ want).reshape(D, K)).max() < 1e-12
    if not zero:
        assert np.abs(np.concatenate([hA.ravel(), hB.ravel()]) - want).max() < 1e-12
    left = g - b @ hA - hB @ a
    assert np.abs(b.T @ left).max() < 1e-12
    assert np.abs(left @ a.T).max() < 1e-12
    plain = g - b @ (b.T @ g) - (g @ a.T) @ a
    assert np.linalg.norm(left) < np.linalg.norm(plain)


def test_alloras_step_of_a_row_is_over_the_root_of_its_norm() -> None:
    A, B, G = drawn(zero=True)
    a, b, g = numpy(A, B, G)
    rule = AllPairs(torch.optim.SGD([A, B], lr=RATE), [(A, B)])
    back(A, B, G)
    rule.step()
    rates = 1 / np.sqrt(np.linalg.norm(b, axis=1, keepdims=True) + 1 / ETA**2)
    assert np.allclose(rates, ETA)
    assert np.abs(B.detach().numpy() - (b - RATE * rates * (g @ a.T))).max() < 1e-14
    rates = 1 / np.sqrt(np.linalg.norm(a, axis=1, keepdims=True) + 1 / ETA**2)
    assert np.abs(A.detach().numpy() - (a - RATE * rates * (b.T @ g))).max() < 1e-14


def test_pefts_preconditioner_is_the_one_that_its_paper_writes() -> None:
    class Held(nn.Module):
        def __init__(self, A: nn.Parameter, B: nn.Parameter) -> None:
            super().__init__()
            self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
            for side, p in ((self.lora_A, A), (self.lora_B, B)):
                side["p"] = nn.Linear(1, 1, bias=False)
                side["p"].weight = p

    A, B, G = drawn()
    a, b, g = numpy(A, B, G)
    model: Any = type("M", (), {"peft": nn.ModuleDict({"x": Held(A, B)})})()
    rule = preconditioned(torch.optim.SGD([A, B], lr=RATE), model)
    back(A, B, G)
    rule.step()
    eye = 1e-2 * np.eye(R)
    assert (
        np.abs(A.detach().numpy() - (a - RATE * np.linalg.inv(b.T @ b + eye) @ b.T @ g)).max()
        < 1e-12
    )
    assert (
        np.abs(B.detach().numpy() - (b - RATE * g @ a.T @ np.linalg.inv(a @ a.T + eye))).max()
        < 1e-12
    )


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_a_masked_step_is_a_step_of_the_leading_ranks_alone(keep: int) -> None:
    """DyLoRA's of any rank; of none, CoTo's of an adapter that is off: nothing moves."""
    A, B, G = drawn()
    a, b, g = numpy(A, B, G)
    mask = (torch.arange(R) < keep).double()
    rule = Masked(torch.optim.SGD([A, B], lr=RATE), [(A, B)], iter([[mask]]))
    rule.zero_grad()
    assert np.allclose((B @ A).detach().numpy(), b[:, :keep] @ a[:keep])
    back(A, B, G)
    if keep:
        assert B.grad is not None
        assert not bool(B.grad[:, keep:].any()), "else a clipped norm would count it"
    rule.step()
    a[:keep], b[:, :keep] = a[:keep] - RATE * b[:, :keep].T @ g, b[:, :keep] - RATE * g @ a[:keep].T
    assert np.abs(A.detach().numpy() - a).max() < 1e-14
    assert np.abs(B.detach().numpy() - b).max() < 1e-14


def test_what_is_masked_is_drawn_as_the_papers_say() -> None:
    A, B, _ = drawn()
    pairs, n = [(A, B)] * 5, 4000
    g = torch.Generator().manual_seed(1)
    drawn_ranks = masks("dylora", pairs, 1.0, g)
    b = np.array([[int(m.sum()) for m in next(drawn_ranks)] for _ in range(n)])
    assert (b == b[:, :1]).all(), "one for all modules"
    assert np.abs(np.bincount(b[:, 0], minlength=R + 1)[1:] / n - 1 / R).max() < 0.03
    for p in (0.0, 0.3, 1.0):
        drawn_on = masks("coto", pairs, p, g)
        on = np.array([[float(m[0]) for m in next(drawn_on)] for _ in range(n)])
        assert np.abs(on.mean(0) - p).max() < 0.05
        assert len({*on.flatten().tolist()}) == (2 if 0 < p < 1 else 1)


RULED = ["preconditioned", "riemann", "lora-pro", "allora", "coto", "dylora"]


@pytest.mark.parametrize("rule", few(RULED, "riemann", "coto"))
def test_a_run_under_a_rule_is_certified_and_is_not_the_plain_run(
    settings: Settings, rule: str
) -> None:
    """fedex: what leaves is A and B as ever, so its promise holds under each."""
    ran = federate(settings(**quick("fedex", **{"train.rule": rule, "train.steps": 2})))
    plain = federate(settings(**quick("fedex", **{"train.steps": 2, "run.name": "plain"})))
    for r in ran.rounds[1:]:
        assert not r["failures"]
        assert r["proof"]["deviation"] < r["proof"]["bound"]
        assert r["certificate"]["excess"] <= 1
    assert ran.rounds[-1]["proof"]["norm"] > 0
    assert ran.adapter != plain.adapter


def test_what_goes_with_no_rule_is_refused(settings: Settings) -> None:
    for changes, says in (
        ({"lora.form": "vera", "clients.ranks": "4"}, "is of LoRA's A and B of a module"),
        ({"train.rule": "coto", "train.precision": "float16"}, "overflow is left out"),
        ({"train.rule": "preconditioned", "train.lr-ratio-b": 4.0}, "one rate for all"),
        ({"privacy.epsilon": 3.0}, "private step has a loop of its own"),
    ):
        with pytest.raises(ConfigError, match=says):
            preflight.read(settings(**{"train.rule": "riemann", **changes}))
