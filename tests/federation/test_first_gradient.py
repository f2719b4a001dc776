"""Fed-SB's start by gradient: the step it takes, what is kept of it, and where there is none."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora import preflight
from fedlora.errors import StrategyError
from fedlora.federation.client import first_gradient as client_half
from fedlora.federation.server.first_gradient import first_rate
from fedlora.lora.adapter import Factors
from fedlora.strategies.fedsb import FedSB
from fedlora.training import cache
from fedlora.training.data.batches import collate
from tests.support.tiny_federation import Ran, federate, quick

Settings = Callable[..., dict[str, object]]
UPDATE = {"strategy.fedsb.init-from": "update-approx", "run.rounds": 1, "clients.ranks": "4"}


def begun(given: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> tuple[Factors, Ran]:
    """What Fed-SB begins with, and the run."""
    found: list[Factors] = []
    real = FedSB.from_gradient

    def kept(self: FedSB, state: Factors, mean: Any) -> Factors:
        found.append(real(self, state, mean))
        return found[-1]

    monkeypatch.setattr(FedSB, "from_gradient", kept)
    ran = federate(given)
    return found[0], ran


def gradients(given: dict[str, object]) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Each client's mean gradient of the plain model, one example at a time, and its rows."""
    config = preflight.read(given)
    labels = cache.corpus(config).labels
    model = cache.model(config, labels)
    model.rebase("slow", [])
    found, counts = [], []
    weights = {m: model.adapted[m].get_base_layer().weight for m in model.shapes}
    for i in range(config.clients.count):
        rows = cache.encoded("train", i, config, labels)
        total = {m: torch.zeros(W.shape, dtype=torch.float64) for m, W in weights.items()}
        with model.peft.disable_adapter():
            for W in weights.values():
                W.requires_grad_(True)
            for n in range(len(rows)):
                batch = collate(rows, torch.tensor([n]))
                label = batch.pop("labels")
                loss = cross_entropy(model.peft(**batch).logits, label)
                for m, G in zip(
                    weights, torch.autograd.grad(loss, [*weights.values()]), strict=True
                ):
                    total[m] += G.double() / len(rows)
            for W in weights.values():
                W.requires_grad_(False)
        found.append(total)
        counts.append(len(rows))
    return found, counts


def kept_of(M: Tensor, state: Factors, m: str) -> float:
    """Share of M's energy in the frames, of the most that any of their rank could hold."""
    A, B = state.A[m].double(), state.B[m].double()
    best = torch.linalg.svdvals(M)[: len(A)].square().sum()
    return float((B.T @ M @ A.T).square().sum() / best)


@pytest.mark.parametrize("signs", ["pooled", "clients"])
def test_the_frames_hold_the_most_of_the_first_step_that_their_rank_can(
    signs: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against G of autograd, one example at a time, and the full SVD of the dense step."""
    given = settings(**quick("fedsb", **UPDATE, **{"strategy.fedsb.signs": signs}))
    state, ran = begun(given, monkeypatch)
    G, n = gradients(given)
    p = [x / sum(n) for x in n]
    told = ran.rounds[0]["start"]
    for m in state.A:
        pooled = sum(w * g[m] for w, g in zip(p, G, strict=True)).sign()
        mean = sum(w * g[m].sign() for w, g in zip(p, G, strict=True))
        M, other = (pooled, mean) if signs == "pooled" else (mean, pooled)
        assert kept_of(M, state, m) > 0.98
        assert kept_of(M, state, m) > kept_of(other, state, m)
        S = torch.linalg.svdvals(M)
        energy = float(S[:4].square().sum() / S.square().sum())
        near = 0.05 if signs == "pooled" else 0.4  # whose |M| is an estimate
        assert told["modules"][m]["energy"] == pytest.approx(energy, rel=near)
        assert told["modules"][m]["found"] == 4
    assert "keeps" in told["lines"][0]


def test_the_core_is_the_authors_first_step(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s B R A = -eta M to the frames, with eta the first rate of a warm-up over .02 of the run."""
    given = settings(**quick("fedsb", **UPDATE, **{"train.lr": 0.01, "train.steps": 200}))
    config = preflight.read(given)
    eta = 0.01 / (0.02 * 200)
    assert first_rate(config, 200.0) == pytest.approx(eta)
    assert first_rate(config, 10.0) == 0.01  # a warm-up of less than a step
    quickly = {**given, "train.steps": 1, "strategy.fedsb.eta": eta}
    state, _ = begun(quickly, monkeypatch)
    G, n = gradients(given)
    for m in state.A:
        M = sum(x / sum(n) * g[m] for x, g in zip(n, G, strict=True)).sign()
        A, B = state.A[m].double(), state.B[m].double()
        want = -eta * B @ (B.T @ M @ A.T) @ A
        got = state.scale[m] * B @ state.R[m].double() @ A
        assert float((got - want).norm()) < 0.02 * float(want.norm())


def test_a_head_of_zeros_is_trained_for_the_gradient_and_put_back(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(**quick("fedsb", **UPDATE, **{"model.pooling": "mean"}))
    state, ran = begun(given, monkeypatch)
    for m, A in state.A.items():
        assert float((A.abs() > 1e-6).float().mean()) > 0.9, m  # no coordinate axes
    heads = [x for name, x in state.other.items() if x.ndim > 1]
    assert heads
    assert not any(bool(x.any()) for x in heads)
    config = preflight.read(given)
    model = cache.model(config, cache.corpus(config).labels)
    assert not any(bool(p.any()) for p in client_half.heads_as_loaded(model) if p.ndim > 1)
    assert all(p.grad is None for p in client_half.heads_as_loaded(model))
    assert ran.rounds[-1]["round"] == 1


def test_a_head_of_zeros_that_nobody_trains_is_refused(settings: Settings) -> None:
    """The loss would stand still at log(classes), round after round."""
    frozen = {"strategy.fedsvd.head": "frozen", "model.pooling": "mean"}
    drawn_head = {"model.pooling": "default", "run.name": "drawn"}
    with pytest.raises(StrategyError, match=r"weight begins at zero and is not trained"):
        federate(settings(**quick("fedsvd", **frozen)))
    drawn = federate(settings(**quick("fedsvd", **{**frozen, **drawn_head})))
    first, last = (drawn.rounds[i]["train_loss"] for i in (1, 2))
    assert first != last


def test_where_no_gradient_reaches_a_module_the_run_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counterexample: the head left at zero, as it was taken before."""
    monkeypatch.setattr(client_half, "trained_heads", lambda *_: nullcontext())
    given = settings(**quick("fedsb", **UPDATE, **{"model.pooling": "mean"}))
    with pytest.raises(StrategyError, match=r"zero in every adapted module.*pooling = 'default'"):
        federate(given)
